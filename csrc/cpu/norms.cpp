// The spectral clamp of small blocks, for calls that want no derivative.
//
// The Gram matrix G = w^T w is squared at most kSquarings times, which leaves nothing but the
// eigenspaces next to the largest one, whatever the gap between them. The Rayleigh quotient of any
// vector in there is at most the largest eigenvalue and short of it by less than
// 1 / (e 2^(kSquarings + 1)): sigma by less than 2e-9. It is never too large, so that a block
// within the norm is left alone. Mostly the power stands still after some ten squarings. An
// eigenvalue's share c in it becomes c^2, so that a change below kStill leaves shares next to 0,
// which no longer count, and next to 1, whose eigenvalues are as good as the largest.
#include <algorithm>
#include <cmath>
#include <vector>

#include "scan.h"

namespace gatedrnn {
namespace {

// Multiply-adds that are worth waking a second thread for.
constexpr int64_t kWorthSharing = 1 << 20;

// b = a^2 for a symmetric k x k matrix.
void square(const double* a, double* b, int64_t k) {
  for (int64_t i = 0; i < k; ++i) {
    double* row = b + i * k;
    std::fill(row, row + k, 0.0);
    for (int64_t j = 0; j < k; ++j) {
      const double factor = a[i * k + j];
      for (int64_t l = 0; l < k; ++l) row[l] += factor * a[j * k + l];
    }
  }
}

// Divides by the largest diagonal element, which bounds every element of a Gram matrix; returns it.
double normalise(double* a, int64_t k) {
  double largest = 0;
  for (int64_t i = 0; i < k; ++i) largest = std::max(largest, a[i * k + i]);
  if (largest > 0)
    for (int64_t i = 0; i < k * k; ++i) a[i] /= largest;
  return largest;
}

template <class T>
double largest_singular_value(const T* w, int64_t k, double* gram, double* power, double* next) {
  double scale = 0;  // of the block, so that no square can overflow
  for (int64_t i = 0; i < k * k; ++i) {
    if (!std::isfinite(w[i])) return std::nan("");
    scale = std::max(scale, std::abs(static_cast<double>(w[i])));
  }
  if (scale == 0) return 0;
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j) {
      double sum = 0;
      for (int64_t r = 0; r < k; ++r) sum += (w[r * k + i] / scale) * (w[r * k + j] / scale);
      gram[i * k + j] = sum;
    }
  std::copy(gram, gram + k * k, power);
  normalise(power, k);
  double change = 1;
  for (int n = 0; n < kSquarings && change > kStill; ++n) {
    square(power, next, k);
    normalise(next, k);
    change = 0;
    for (int64_t i = 0; i < k * k; ++i) change = std::max(change, std::abs(next[i] - power[i]));
    std::swap(power, next);
  }
  // The column of the largest diagonal element is the longest.
  int64_t column = 0;
  for (int64_t i = 1; i < k; ++i)
    if (power[i * k + i] > power[column * k + column]) column = i;
  const double* v = power + column * k;
  double above = 0, below = 0;
  for (int64_t i = 0; i < k; ++i) {
    double image = 0;
    for (int64_t j = 0; j < k; ++j) image += gram[i * k + j] * v[j];
    above += v[i] * image;
    below += v[i] * v[i];
  }
  return std::sqrt(above / below) * scale;
}

template <class T>
void clamp_blocks(const T* weight, T* clamped, int64_t blocks, int64_t k) {
  const auto clamp = [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(3 * k * k);
    for (int64_t i = begin; i < end; ++i) {
      const T* from = weight + i * k * k;
      const double sigma = largest_singular_value(from, k, scratch.data(), scratch.data() + k * k,
                                                  scratch.data() + 2 * k * k);
      const double factor = 1 / (sigma > 1 || std::isnan(sigma) ? sigma : 1);
      for (int64_t j = 0; j < k * k; ++j) clamped[i * k * k + j] = static_cast<T>(from[j] * factor);
    }
  };
  if (blocks * k * k * k * kSquarings < kWorthSharing)
    clamp(0, blocks);
  else
    parallel_for(blocks, clamp);
}

}  // namespace

void clamp_spectral(const float* weight, float* clamped, int64_t blocks, int64_t k) {
  clamp_blocks(weight, clamped, blocks, k);
}
void clamp_spectral(const double* weight, double* clamped, int64_t blocks, int64_t k) {
  clamp_blocks(weight, clamped, blocks, k);
}

}  // namespace gatedrnn
