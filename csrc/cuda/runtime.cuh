// The CUDA runtime, or the tests' emulation of it on a CPU.
#pragma once

#ifdef GATEDRNN_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "geometry.h"

namespace gatedrnn::cuda {

#define GATEDRNN_DEVICE __device__ __forceinline__
// For code that is rare and long, or needs all registers. Inline everything else: a function that
// is not inlined reads the kernel's parameters from memory.
#define GATEDRNN_NOINLINE __device__ __noinline__ inline

// Older architectures need more registers than Hopper for the same source.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kOldArchitecture = true;
#else
constexpr bool kOldArchitecture = false;
#endif

// Shared memory of a multiprocessor, in bytes.
#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
constexpr int kSharedMemory = 228 << 10;
#elif __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 870
constexpr int kSharedMemory = 164 << 10;
#elif __CUDA_ARCH__ >= 860
constexpr int kSharedMemory = 100 << 10;
#else
constexpr int kSharedMemory = 64 << 10;
#endif

#ifdef GATEDRNN_EMULATION
// One instruction moves the whole value. A GPU faults if the address is not a multiple of its size.
template <class T>
GATEDRNN_DEVICE T* aligned(T* p) {
  gatedrnn::emulation::check_aligned(p, sizeof(T));
  return p;
}
template <class T>
GATEDRNN_DEVICE T load_bypass_l1(const T* p) {
  return *aligned(p);
}
template <class T>
GATEDRNN_DEVICE void assume_initialized(const T& shared) {
  gatedrnn::emulation::assume_initialized(&shared, sizeof(T));
}
inline int64_t opaque_add(int64_t a, int64_t b) { return a + b; }
inline bool opaque_bool(bool condition) { return condition; }
inline void prefetch_l2(const void*) {}
GATEDRNN_DEVICE void store_four(float* p, const float (&v)[4]) {
  gatedrnn::emulation::check_aligned(p, sizeof(v));
  for (int k = 0; k < 4; ++k) p[k] = v[k];
}
#else
template <class T>
GATEDRNN_DEVICE T* aligned(T* p) {
  return p;
}
template <class T>
GATEDRNN_DEVICE void assume_initialized(const T&) {}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            A... args) {
  kernel<<<grid, block, shared_bytes, stream>>>(args...);
}

// All shared memory of a kernel is one array. The launch sets its size.
GATEDRNN_DEVICE char* dynamic_shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// A flag between blocks. Who reads the flag also sees everything that was written before it was
// set. The same holds for a counter, and for everything before each addition.
GATEDRNN_DEVICE int load_acquire(const int* p) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
GATEDRNN_DEVICE void store_release(int* p, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" : : "l"(p), "r"(value) : "memory");
}

GATEDRNN_DEVICE void add_release(int* p, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" : : "l"(p), "r"(value) : "memory");
}

// a + b. nvcc would turn repeated additions into a multiplication, which takes twice as long in 64
// bits.
GATEDRNN_DEVICE int64_t opaque_add(int64_t a, int64_t b) {
  asm("add.s64 %0, %0, %1;" : "+l"(a) : "l"(b));
  return a;
}

// A condition that is constant during a loop. nvcc would compile the loop for both values, and for
// all combinations of several conditions.
GATEDRNN_DEVICE bool opaque_bool(bool condition) {
  int hidden = condition;
  asm volatile("" : "+r"(hidden));
  return hidden != 0;
}

// Prefetches global memory into the L2 cache.
GATEDRNN_DEVICE void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" : : "l"(__cvta_generic_to_global(p)));
}

// Stores four values to shared memory with one instruction. Under a condition nvcc would use four,
// whose lanes collide in a quarter of the banks.
GATEDRNN_DEVICE void store_four(float* p, const float (&v)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(p))), "f"(v[0]), "f"(v[1]),
                 "f"(v[2]), "f"(v[3])
               : "memory");
}

// Loads from L2. The L1 cache may hold an old value that another block has replaced.
template <class T>
GATEDRNN_DEVICE T load_bypass_l1(const T* p) {
  if constexpr (std::is_arithmetic_v<T>) {
    return __ldcg(p);
  } else {
    using Words = std::conditional_t<sizeof(T) == 8, uint2, uint4>;
    using Small = std::conditional_t<sizeof(T) == 1, unsigned char, unsigned short>;
    using Word = std::conditional_t<sizeof(T) <= 2, Small,
                                    std::conditional_t<sizeof(T) == 4, unsigned, Words>>;
    static_assert(sizeof(Word) == sizeof(T));
    const Word word = __ldcg(reinterpret_cast<const Word*>(p));
    T value;
    memcpy(&value, &word, sizeof(T));
    return value;
  }
}
#endif

// ---- host --------------------------------------------------------------------------------------

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error for the next launch
  throw std::runtime_error(std::string("gatedrnn: ") + what + ": " + cudaGetErrorString(error));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// Lets a kernel use more than 48 KB of shared memory. The limit belongs to the kernel, not to a
// launch. It always has the same value: otherwise one thread could lower it before another's
// launch.
template <class... P>
void allow_shared_memory(void (*kernel)(P...)) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)),
        "cudaFuncSetAttribute");
}

// As many blocks as the device holds at once, but no more than there are tasks.
template <class... P>
int resident_blocks(void (*kernel)(P...), int threads, size_t shared_bytes, int64_t tasks) {
  allow_shared_memory(kernel);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  const int64_t most =
      int64_t{blocks < 1 ? 1 : blocks} * device_attribute(cudaDevAttrMultiProcessorCount);
  return static_cast<int>(tasks < most ? tasks : most);
}

inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

}  // namespace gatedrnn::cuda
