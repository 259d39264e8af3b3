// Values on the device: conversions between storage types and the state's type, and math.
#pragma once

#include <type_traits>

#include "cuda/runtime.cuh"
#include "recurrence.h"

namespace gatedrnn::cuda {

// The operations that recurrence.h needs.
template <class T>
struct ScalarMath {
  static GATEDRNN_INLINE T constant(int value) { return static_cast<T>(value); }
  static GATEDRNN_INLINE T select(bool condition, T a, T b) { return condition ? a : b; }
  static GATEDRNN_INLINE T tanh(T x) {
    if constexpr (std::is_same_v<T, float>)
      return ::tanhf(x);
    else
      return ::tanh(x);
  }
  static GATEDRNN_INLINE T sigmoid(T x) {
    if constexpr (std::is_same_v<T, float>)
      return 1 / (1 + ::expf(-x));
    else
      return 1 / (1 + ::exp(-x));
  }
};

// The larger value; NaN if either is NaN.
template <class A>
GATEDRNN_DEVICE A maximum_of(A a, A b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<A, float>) {
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
    return larger;
  }
#endif
  return maximum<ScalarMath<A>>(a, b);
}

// v clamped to [-limit, limit]. NaN stays NaN.
template <class A>
GATEDRNN_DEVICE A within(A v, A limit) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<A, float>) {
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(limit));
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(-limit));
    return v;
  }
#endif
  v = v > limit ? limit : v;
  return v < -limit ? -limit : v;
}

template <class A, class S>
GATEDRNN_DEVICE A to_state(S v) {
  if constexpr (std::is_same_v<S, __half>)
    return __half2float(v);
  else if constexpr (std::is_same_v<S, __nv_bfloat16>)
    return __bfloat162float(v);
  else
    return static_cast<A>(v);
}

template <class S, class A>
GATEDRNN_DEVICE S to_storage(A v) {
  if constexpr (std::is_same_v<S, __half>)
    return __float2half_rn(v);
  else if constexpr (std::is_same_v<S, __nv_bfloat16>)
    return __float2bfloat16_rn(v);
  else
    return v;
}

GATEDRNN_INLINE int bytes_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

template <class A>
GATEDRNN_DEVICE Dtype state_dtype() {
  return std::is_same_v<A, double> ? Dtype::kFloat64 : Dtype::kFloat32;
}

// Calls body with a null pointer of the type that stores maps of this dtype. A is the state's type.
// The branch is outside of the loops, so that kernels are not compiled for each dtype.
template <class A, class Body>
GATEDRNN_DEVICE void dispatch_storage(Dtype dtype, const Body& body) {
  if constexpr (std::is_same_v<A, double>) {
    body(static_cast<double*>(nullptr));
  } else {
    if (dtype == Dtype::kFloat32)
      body(static_cast<float*>(nullptr));
    else if (dtype == Dtype::kBFloat16)
      body(static_cast<__nv_bfloat16*>(nullptr));
    else
      body(static_cast<__half*>(nullptr));
  }
}

}  // namespace gatedrnn::cuda
