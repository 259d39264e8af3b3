// The spectral clamp of small blocks, and its first derivative.
//
// The Gram matrix G = w^T w is squared at most kMaxSquarings times, which leaves nothing but the
// eigenspaces next to the largest one, whatever the gap between them. For any vector v in there
// |w v|^2 / |v|^2 is at most the largest eigenvalue, so that a block within the norm is left alone,
// and hardly short of it: sigma by less than 1e-8 of itself. Mostly the power stands still after
// some ten squarings. An eigenvalue's share c in it becomes c^2, so that a change below kTolerance
// leaves shares next to 0, which no longer count, and next to 1, whose eigenvalues are as good as
// the largest.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "scan.h"

namespace gatedrnn {
namespace {

// Multiply-adds that are worth waking a second thread for.
constexpr int64_t kWorthSharing = 1 << 20;

// b = a^T a, which is a^2 for a symmetric matrix. With K the compiler knows k.
template <int64_t K = 0>
void gram(const double* a, double* __restrict b, int64_t k) {
  if (K > 0) k = K;
  for (int64_t i = 0; i < k; ++i) {
    double* row = b + i * k;
    std::fill(row, row + k, 0.0);
    for (int64_t j = 0; j < k; ++j) {
      const double factor = a[j * k + i];
      for (int64_t l = 0; l < k; ++l) row[l] += factor * a[j * k + l];
    }
  }
}

void (*gram_for(int64_t k))(const double*, double*, int64_t) {
  return k == 8 ? gram<8> : k == 16 ? gram<16> : k == 32 ? gram<32> : gram<>;
}

// The largest sum of a row's magnitudes: no eigenvalue is larger.
double largest_row(const double* a, int64_t k) {
  double largest = 0;
  for (int64_t i = 0; i < k; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < k; ++j) sum += std::abs(a[i * k + j]);
    largest = std::max(largest, sum);
  }
  return largest;
}

// Divides by the largest diagonal element, which bounds every element of a Gram matrix; returns it.
double normalise(double* a, int64_t k) {
  double largest = 0;
  for (int64_t i = 0; i < k; ++i) largest = std::max(largest, a[i * k + i]);
  if (largest > 0)
    for (int64_t i = 0; i < k * k; ++i) a[i] /= largest;
  return largest;
}

// Returns the length that it had.
double to_unit_length(double* v, int64_t k) {
  const double length = std::sqrt(std::inner_product(v, v + k, v, 0.0));
  for (int64_t i = 0; i < k; ++i) v[i] /= length;
  return length;
}

// sigma, and u and v with w v = sigma u and w^T u = sigma v. `scratch` holds three matrices.
template <class T>
double largest_singular_value(const T* w, int64_t k, double* scratch, double* u, double* v) {
  double *scaled = scratch, *power = scratch + k * k, *next = power + k * k;
  std::fill(u, u + k, 0.0);
  std::fill(v, v + k, 0.0);
  u[0] = v[0] = 1;
  double scale = 0;  // of the block, so that no square can overflow
  for (int64_t i = 0; i < k * k; ++i) {
    if (!std::isfinite(w[i])) return std::nan("");
    scale = std::max(scale, std::abs(static_cast<double>(w[i])));
  }
  if (scale == 0) return 0;
  for (int64_t i = 0; i < k * k; ++i) scaled[i] = w[i] / scale;
  const auto gram = gram_for(k);
  gram(scaled, power, k);
  // G^(2^n) is `size` times `power`.
  double size = scale * scale * normalise(power, k), change = 1;
  for (int n = 0; n < kMaxSquarings && change > kTolerance; ++n) {
    // Of a norm below one nothing else counts. By then rounding can't have added a thousandth.
    if (n < 8 && size * largest_row(power, k) < 0.999) return 0.5;
    gram(power, next, k);
    size *= size * normalise(next, k);
    change = 0;
    for (int64_t i = 0; i < k * k; ++i) change = std::max(change, std::abs(next[i] - power[i]));
    std::swap(power, next);
  }
  // The column of the largest diagonal element is the longest.
  int64_t column = 0;
  for (int64_t i = 1; i < k; ++i)
    if (power[i * k + i] > power[column * k + column]) column = i;
  std::copy(power + column * k, power + (column + 1) * k, v);
  to_unit_length(v, k);
  for (int64_t i = 0; i < k; ++i) u[i] = std::inner_product(v, v + k, scaled + i * k, 0.0);
  return to_unit_length(u, k) * scale;
}

template <class T>
void clamp_blocks(const ClampArgs& a) {
  const int64_t k = a.k, kept = 1 + 2 * k;
  const auto clamp = [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(3 * k * k + kept);
    for (int64_t i = begin; i < end; ++i) {
      const T* from = static_cast<const T*>(a.weight) + i * k * k;
      T* to = static_cast<T*>(a.clamped) + i * k * k;
      double* const found = a.kept ? a.kept + i * kept : scratch.data() + 3 * k * k;
      double *u = found + 1, *v = u + k;
      const double sigma = largest_singular_value(from, k, scratch.data(), u, v);
      *found = sigma;
      const double factor = sigma <= 1 ? 1 : 1 / sigma;
      for (int64_t j = 0; j < k * k; ++j) to[j] = static_cast<T>(from[j] * factor);
    }
  };
  if (a.blocks * k * k * k * kMaxSquarings < kWorthSharing)
    clamp(0, a.blocks);
  else
    parallel_for(a.blocks, clamp);
}

// Of w / sigma, where d sigma = u^T dw v.
template <class T>
void backward_blocks(const ClampBackwardArgs& a) {
  const int64_t k = a.k;
  for (int64_t i = 0; i < a.blocks; ++i) {
    const T* w = static_cast<const T*>(a.weight) + i * k * k;
    const T* grad = static_cast<const T*>(a.grad) + i * k * k;
    T* to = static_cast<T*>(a.dweight) + i * k * k;
    const double *kept = a.kept + i * (1 + 2 * k), *u = kept + 1, *v = u + k;
    const double sigma = *kept;
    if (sigma <= 1) {
      std::copy(grad, grad + k * k, to);
      continue;
    }
    double along = 0;
    for (int64_t j = 0; j < k * k; ++j) along += static_cast<double>(grad[j]) * w[j];
    for (int64_t row = 0; row < k; ++row)
      for (int64_t j = 0; j < k; ++j) {
        const int64_t at = row * k + j;
        to[at] = static_cast<T>((grad[at] - along / sigma * u[row] * v[j]) / sigma);
      }
  }
}

}  // namespace

void clamp_spectral(const ClampArgs& a) {
  a.is_double ? clamp_blocks<double>(a) : clamp_blocks<float>(a);
}
void clamp_spectral_backward(const ClampBackwardArgs& a) {
  a.is_double ? backward_blocks<double>(a) : backward_blocks<float>(a);
}

}  // namespace gatedrnn
