#include "device_properties.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "executor.h"

namespace gatedrnn::emulation {
namespace {

constexpr int kThreadsPerMultiprocessor = 2048, kBlocksPerMultiprocessor = 32;
constexpr int kUnaskedSharedBytes = 48 << 10;
constexpr int kReservedSharedBytes = 1 << 10;  // of every block, by the system

int most_shared_bytes() {
  return static_cast<int>(setting("GATEDRNN_EMULATION_SHARED_BYTES", 232448));
}

std::mutex mutex;
std::map<const void*, int> allowed_shared_bytes;
std::map<std::pair<const void*, int>, int> most_allowed;  // by kernel and device

}  // namespace

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > most_shared_bytes()) return cudaErrorInvalidValue;
  const std::lock_guard lock(mutex);
  int& most = most_allowed[{kernel, most_shared_bytes()}];
  if (value < most)
    throw std::runtime_error("emulated attribute: a kernel's limit of shared memory goes from " +
                             std::to_string(most) + " to " + std::to_string(value) +
                             " bytes, which another thread's launch may need");
  allowed_shared_bytes[kernel] = most = value;
  return cudaSuccess;
}

void check_shared_bytes(const void* kernel, size_t shared_bytes) {
  const std::lock_guard lock(mutex);
  const auto found = allowed_shared_bytes.find(kernel);
  int most = found == allowed_shared_bytes.end() ? 0 : found->second;
  most = std::min(std::max(most, kUnaskedSharedBytes), most_shared_bytes());
  if (shared_bytes > static_cast<size_t>(most))
    throw std::runtime_error("emulated launch: " + std::to_string(shared_bytes) +
                             " bytes of shared memory, and the kernel may have " +
                             std::to_string(most));
}

cudaError_t count_active_blocks(int* blocks, int threads, size_t shared_bytes) {
  const int shared = static_cast<int>(shared_bytes) + kReservedSharedBytes;
  *blocks = std::min({kBlocksPerMultiprocessor, kThreadsPerMultiprocessor / threads,
                      (most_shared_bytes() + kReservedSharedBytes) / shared});
  return cudaSuccess;
}

}  // namespace gatedrnn::emulation

using namespace gatedrnn::emulation;

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidValue;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = static_cast<int>(setting("GATEDRNN_EMULATION_MULTIPROCESSORS", 4));
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 50 << 20;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = kThreadsPerMultiprocessor;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = most_shared_bytes() + kReservedSharedBytes;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = most_shared_bytes();
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t) {
  std::memset(to, byte, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
