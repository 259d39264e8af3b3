// The part of CUDA that the kernels use, for an ordinary C++ compiler: csrc/cuda/runtime.cuh
// includes it instead of CUDA's headers if GATEDRNN_EMULATION is defined.
//
// Not emulated: writes that other blocks see late (here every write is seen at once, and a race
// with it is an error), speed.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "device_properties.h"
#include "executor.h"
#include "half_types.h"
#include "translation.h"

// ---- the language ------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define threadIdx (gatedrnn::emulation::place.thread)
#define blockIdx (gatedrnn::emulation::place.block)
#define blockDim (gatedrnn::emulation::place.block_size)
#define gridDim (gatedrnn::emulation::place.grid_size)

inline char* dynamic_shared_memory() { return gatedrnn::emulation::shared_memory(); }

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            A... args) {
  const auto code = reinterpret_cast<const void*>(kernel);
  gatedrnn::emulation::check_shared_bytes(code, shared_bytes);
  std::tuple<P...> parameters(args...);
  const auto translated = gatedrnn::emulation::translated(code, {sizeof(P)...});
  gatedrnn::emulation::run(
      {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes, [&] {
         if (!translated) return std::apply(kernel, parameters);
         std::apply(
             [&](P&... parameter) {
               char* const addresses[] = {reinterpret_cast<char*>(&parameter)...};
               translated(addresses);
             },
             parameters);
       }});
}

// ---- threads meet ------------------------------------------------------------------------------

// `where` is the place of the call, for messages; no caller gives it. All are inlined, so that the
// executor returns to a place of the caller's own.

__forceinline__ void __syncthreads(std::source_location where = std::source_location::current()) {
  gatedrnn::emulation::meet_block(0, where);
}

__forceinline__ int __syncthreads_or(int vote,
                                     std::source_location where = std::source_location::current()) {
  return gatedrnn::emulation::meet_block(vote, where);
}

namespace gatedrnn::emulation {

inline int lane() { return static_cast<int>(place.thread.x % kWarp); }

__forceinline__ unsigned votes(unsigned mask, int vote, Where where) {
  return static_cast<unsigned>(
      meet_warp(mask, Exchange::kVotes, static_cast<uint64_t>(vote != 0), lane(), where));
}

template <class T>
__forceinline__ T shuffle(unsigned mask, T value, int source, Where where) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet_warp(mask, Exchange::kValue, bits, source, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// A distance, of lanes, and the width of a piece. The device would take some bits of them.
__forceinline__ void check_shuffle(const char* what, unsigned distance, int width) {
  if (distance >= kWarp) refuse_shuffle(what, distance);
  if (width <= 0 || width > kWarp || !std::has_single_bit(static_cast<unsigned>(width)))
    refuse_shuffle("width", width);
}

}  // namespace gatedrnn::emulation

__forceinline__ void __syncwarp(unsigned mask = 0xffffffff,
                                std::source_location where = std::source_location::current()) {
  using namespace gatedrnn::emulation;
  meet_warp(mask, Exchange::kNothing, 0, lane(), where);
}

__forceinline__ unsigned __ballot_sync(
    unsigned mask, int vote, std::source_location where = std::source_location::current()) {
  return gatedrnn::emulation::votes(mask, vote, where);
}

__forceinline__ int __any_sync(unsigned mask, int vote,
                               std::source_location where = std::source_location::current()) {
  return gatedrnn::emulation::votes(mask, vote, where) != 0;
}

__forceinline__ int __all_sync(unsigned mask, int vote,
                               std::source_location where = std::source_location::current()) {
  return gatedrnn::emulation::votes(mask, vote, where) == mask;
}

// A warp is cut into pieces of `width` lanes, a power of two. Past the end of its piece a lane gets
// its own value.
template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int source, int width = 32,
                              std::source_location where = std::source_location::current()) {
  gatedrnn::emulation::check_shuffle("lane", 0, width);
  const int lane = gatedrnn::emulation::lane(), first = lane & -width;
  return gatedrnn::emulation::shuffle(mask, value, first + (source & (width - 1)), where);
}

template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                 std::source_location where = std::source_location::current()) {
  gatedrnn::emulation::check_shuffle("delta", delta, width);
  const int lane = gatedrnn::emulation::lane(), source = lane - static_cast<int>(delta);
  const bool inside = source >= (lane & -width);
  return gatedrnn::emulation::shuffle(mask, value, inside ? source : lane, where);
}

template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                   std::source_location where = std::source_location::current()) {
  gatedrnn::emulation::check_shuffle("delta", delta, width);
  const int lane = gatedrnn::emulation::lane(), source = lane + static_cast<int>(delta);
  const bool inside = source <= (lane | (width - 1));
  return gatedrnn::emulation::shuffle(mask, value, inside ? source : lane, where);
}

template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int flipped, int width = 32,
                                  std::source_location where = std::source_location::current()) {
  gatedrnn::emulation::check_shuffle("mask", static_cast<unsigned>(flipped), width);
  const int lane = gatedrnn::emulation::lane(), source = lane ^ flipped;
  const bool inside = source <= (lane | (width - 1));
  return gatedrnn::emulation::shuffle(mask, value, inside ? source : lane, where);
}

// ---- memory that threads share -----------------------------------------------------------------

__forceinline__ int load_acquire(const int* address,
                                 std::source_location where = std::source_location::current()) {
  return gatedrnn::emulation::load_acquire(address, where);
}

__forceinline__ void store_release(int* address, int value,
                                   std::source_location where = std::source_location::current()) {
  gatedrnn::emulation::store_release(address, value, where);
}

__forceinline__ int atomicAdd(int* address, int value,
                              std::source_location where = std::source_location::current()) {
  return gatedrnn::emulation::add(address, value, false, where);
}

__forceinline__ void add_release(int* address, int value,
                                 std::source_location where = std::source_location::current()) {
  gatedrnn::emulation::add(address, value, true, where);
}

__forceinline__ void __nanosleep(unsigned,
                                 std::source_location where = std::source_location::current()) {
  gatedrnn::emulation::poll(where);
}

namespace gatedrnn::emulation {

__forceinline__ void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) misaligned(address, bytes);
}

}  // namespace gatedrnn::emulation

template <class T>
T __ldg(const T* address) {
  return *address;
}

// ---- vectors -----------------------------------------------------------------------------------

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- arithmetic --------------------------------------------------------------------------------

// CUDA's overloads, and no template: one of unlike types is an error there as well.
#define GATEDRNN_MIN_MAX(T)                        \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
GATEDRNN_MIN_MAX(int)
GATEDRNN_MIN_MAX(unsigned)
GATEDRNN_MIN_MAX(long)
GATEDRNN_MIN_MAX(unsigned long)
GATEDRNN_MIN_MAX(long long)
GATEDRNN_MIN_MAX(unsigned long long)
#undef GATEDRNN_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
// The C library declares functions of these names.
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
#define __expf expf
#define __logf logf

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
