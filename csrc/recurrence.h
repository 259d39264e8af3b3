// The math, once: every function is Eq. (3) or its adjoint on one value, scalar or vector.
//
// T is a scalar or a vector type with the usual operators; M is its math: constant, select, tanh,
// sigmoid. docs/how-it-works/math.md derives the adjoint.
#pragma once

#include "scan.h"

namespace gatedrnn {

// a_i = x_i + g_i * (w h_{i-1} + b), Eq. (3); u is the bracket.
template <class T>
GATEDRNN_INLINE T preactivation(T x, T g, T u) {
  return x + g * u;
}

// h_i = theta(a_i).
template <class M, class T>
GATEDRNN_INLINE T activation(Nonlinearity kind, T a) {
  switch (kind) {
    case Nonlinearity::kTanh:
      return M::tanh(a);
    case Nonlinearity::kRelu:
      return M::select(a < T{}, T{}, a);  // NaN stays NaN
    case Nonlinearity::kSigmoid:
      return M::sigmoid(a);
    case Nonlinearity::kIdentity:
      break;
  }
  return a;
}

// theta'(a_i) * v, from h_i = theta(a_i) alone.
template <class M, class T>
GATEDRNN_INLINE T activation_backward(Nonlinearity kind, T h, T v) {
  switch (kind) {
    case Nonlinearity::kTanh:
      return (1 - h * h) * v;
    case Nonlinearity::kRelu:
      return M::select(h <= T{}, T{}, v);  // v where h is NaN, as in PyTorch
    case Nonlinearity::kSigmoid:
      return h * (1 - h) * v;
    case Nonlinearity::kIdentity:
      break;
  }
  return v;
}

// The activation of the gate, |g_i| <= 1 (section 3.2), and its derivative.
template <class M, class T>
GATEDRNN_INLINE T activate_gate(GateActivation kind, T g) {
  const T one = M::constant(1);
  switch (kind) {
    case GateActivation::kClamp:
      g = M::select(g > one, one, g);
      return M::select(g < -one, -one, g);  // NaN stays NaN
    case GateActivation::kTanh:
      return M::tanh(g);
    case GateActivation::kSigmoid:
      return M::sigmoid(g);
    case GateActivation::kNone:
      break;
  }
  return g;
}

template <class M, class T>
GATEDRNN_INLINE T gate_activation_derivative(GateActivation kind, T g) {
  const T one = M::constant(1);
  switch (kind) {
    case GateActivation::kClamp:  // 1 at |g| = 1 exactly, 0 at NaN
      return M::select((g <= one) & (g >= -one), one, T{});
    case GateActivation::kTanh:
      return smooth_derivative(kind, M::tanh(g));
    case GateActivation::kSigmoid:
      return smooth_derivative(kind, M::sigmoid(g));
    case GateActivation::kNone:
      break;
  }
  return one;
}

// The derivative of a smooth activation, from its result.
template <class T>
GATEDRNN_INLINE T smooth_derivative(GateActivation kind, T y) {
  switch (kind) {
    case GateActivation::kTanh:
      return 1 - y * y;
    case GateActivation::kSigmoid:
      return y * (1 - y);
    case GateActivation::kNone:
    case GateActivation::kClamp:
      break;
  }
  return T{} + 1;
}

// max that propagates NaN, as torch.maximum.
template <class M, class T>
GATEDRNN_INLINE T maximum(T h, T m) {
  const T larger = M::select(m < h, h, m);  // m where either is NaN
  return M::select(h != h, h, larger);
}

}  // namespace gatedrnn
