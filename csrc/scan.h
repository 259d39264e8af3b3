// The whole contract between the op (checks, allocation) and the kernels: two plain structs.
#pragma once

#include <cstdint>
#include <functional>

#include "geometry.h"

namespace gatedrnn {

// The values are the codes of gatedrnn/_options.py. Every switch over an option names all of them,
// and the compiler refuses one that lacks a case (-Werror=switch).
enum class Merge : int { kNone, kMax, kMean, kSum };
enum class Nonlinearity : int { kIdentity, kTanh, kRelu, kSigmoid };
enum class GateActivation : int { kNone, kClamp, kTanh, kSigmoid };
enum class Dtype : int { kFloat64, kFloat32, kBFloat16, kFloat16 };

// Whether maps are merged by a maximum; the others are added, and multiplied by merge_scale.
GATEDRNN_INLINE constexpr bool is_maximum(Merge merge) {
  switch (merge) {
    case Merge::kMax:
      return true;
    case Merge::kNone:
    case Merge::kMean:
    case Merge::kSum:
      break;
  }
  return false;
}
template <class A>
GATEDRNN_INLINE constexpr A merge_scale(Merge merge, int64_t directions) {
  switch (merge) {
    case Merge::kMean:
      return A(1) / static_cast<A>(directions);
    case Merge::kNone:
    case Merge::kMax:
    case Merge::kSum:
      break;
  }
  return A(1);
}
// Whether the gate's activation takes a function that is long to compute; the others only clamp.
GATEDRNN_INLINE constexpr bool is_smooth(GateActivation kind) {
  switch (kind) {
    case GateActivation::kTanh:
    case GateActivation::kSigmoid:
      return true;
    case GateActivation::kNone:
    case GateActivation::kClamp:
      break;
  }
  return false;
}

// The state (hidden maps, weights, sums) is float64 for float64 maps, else float32.
struct ScanArgs {
  Dtype dtype = Dtype::kFloat32;  // of x, g and their gradients
  int64_t n = 0, c = 0, h = 0, w = 0;
  int64_t block = 0;       // C / groups: channels that a block of the weight mixes
  int64_t directions = 0;  // D
  int direction[kDirections] = {};
  Merge merge = Merge::kMax;
  Nonlinearity nonlinearity = Nonlinearity::kIdentity;
  GateActivation gate_activation = GateActivation::kNone;

  const void* x = nullptr;  // (N, C, H, W)
  Strides x_strides;
  const void* g = nullptr;  // (N, D|1, C|1, H, W), null for g = 1
  Strides g_strides;
  bool gate_directions = false;  // a gate map for each direction
  bool gate_channels = false;    // a gate for each channel
  const void* weight = nullptr;  // (D, C, block) dense, in the state's type
  const void* bias = nullptr;    // (D, C) dense, in the state's type, or null

  // Forward. y is of x's dtype. With max, mask may be null.
  void* y = nullptr;  // (N, D|1, C, H, W), d is 0 when merged
  uint8_t* mask =
      nullptr;  // (N, C, H, W), as y: bit d is set where direction d attains the maximum
  Strides y_strides;
};

struct BackwardArgs : ScanArgs {
  const void* grad = nullptr;  // dL/dy (N, D|1, C, H, W), any strides, dtype as x
  Strides grad_strides;
  // Results: dx and dg of x's dtype, the others in the state's type. dx is always written; null
  // skips the others.
  void* dx = nullptr;  // (N, C, H, W)
  Strides dx_strides;
  void* dg = nullptr;  // as g
  Strides dg_strides;
  void* dweight = nullptr;  // (D, C, block) dense
  void* dbias = nullptr;    // (D, C) dense
};

// Runs body(begin, end) over pieces of [0, count) on the framework's thread pool. An exception of
// the body reaches the caller, whichever thread it was thrown in.
void parallel_for(int64_t count, const std::function<void(int64_t, int64_t)>& body);
int64_t thread_count();

// CPU kernels, one pair for each instruction set compiled; `cpu_kernels` picks once.
struct CpuKernels {
  const char* name;
  void (*forward)(const ScanArgs&);
  void (*backward)(const BackwardArgs&);
};
const CpuKernels& cpu_kernels();

const char* cpu_capability();

// The spectral clamp: clamped = weight / max(1, sigma) for each of `blocks` dense k x k matrices in
// float64 or float32, sigma being the largest singular value, with w v = sigma u and w^T u = sigma
// v. What is kept of a matrix for the derivative: sigma, u and v, one behind the other. See
// cpu/norms.cpp, also for how often the Gram matrix is squared, and what change is none.
struct ClampArgs {
  int64_t blocks, k;
  bool is_double;
  const void* weight;
  void* clamped;
  double* kept;  // (blocks, 1 + 2 k), or null
};
struct ClampBackwardArgs {
  int64_t blocks, k;
  bool is_double;
  const void *grad, *weight;  // dL/d clamped
  const double* kept;
  void* dweight;
};
constexpr int kMaxSquarings = 26;
constexpr double kTolerance = 1e-12;
void clamp_spectral(const ClampArgs&);
void clamp_spectral_backward(const ClampBackwardArgs&);

// CUDA kernels, on the current device. With a null workspace nothing runs and the bytes of device
// memory that the call needs are returned; `stream` is a cudaStream_t.
namespace cuda {
int64_t forward(const ScanArgs&, void* workspace, void* stream);
int64_t backward(const BackwardArgs&, void* workspace, void* stream);
int64_t clamp_spectral(const ClampArgs&, void* workspace, void* stream);
int64_t clamp_spectral_backward(const ClampBackwardArgs&, void* workspace, void* stream);
}  // namespace cuda

}  // namespace gatedrnn
