// The spectral clamp of each block of a weight, and its first derivative, as in cpu/norms.cpp.
//
// A thread block clamps one matrix, in shared memory and in double precision. Many GPUs have only
// two units for doubles in a multiprocessor. So matrices are scaled by powers of two, whose
// exponents are integers. gatedrnn/norms.py clamps larger matrices.
#include "cuda/runtime.cuh"
#include "scan.h"

namespace gatedrnn::cuda {
namespace {

constexpr int kMaxSize = 32;  // of a matrix; SMALL in gatedrnn/norms.py
constexpr int kMostThreads = 512;
constexpr int kWarp = 32, kSlots = kMostThreads / kWarp;

// The exponent bits of v >= 0. Zero has the smallest exponent.
GATEDRNN_DEVICE int64_t exponent_of(double v) {
  int64_t bits;
  memcpy(&bits, &v, sizeof(bits));
  bits >>= 52;
  return bits < 1 ? 1 : bits > 2045 ? 2045 : bits;
}
// The power of two that brings v into [1, 2).
GATEDRNN_DEVICE double inverse_power(double v) {
  const int64_t bits = (2046 - exponent_of(v)) << 52;
  memcpy(&v, &bits, sizeof(v));
  return v;
}

// For all threads of a block: combines their values, in the order of a tree.
template <class V, class Combine>
GATEDRNN_DEVICE V combined(V value, double* slots, const Combine& combine) {
  static_assert(sizeof(V) == sizeof(double));
  V* const parts = reinterpret_cast<V*>(slots);
  for (int apart = kWarp / 2; apart > 0; apart /= 2)
    value = combine(value, __shfl_xor_sync(0xffffffff, value, apart));
  __syncthreads();  // all threads have read the slots
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = parts[0];
  for (unsigned i = 1; i < blockDim.x / kWarp; ++i) value = combine(value, parts[i]);
  return value;
}
GATEDRNN_DEVICE double sum_of_all(double value, double* slots) {
  return combined(value, slots, [](double a, double b) { return a + b; });
}
GATEDRNN_DEVICE double largest_of_all(double value, double* slots) {
  return combined(value, slots, [](double a, double b) { return a < b ? b : a; });
}

// The trace bounds every element of a Gram matrix.
GATEDRNN_DEVICE double trace_of(const double* matrix, int k, double* slots) {
  double sum = 0;
  for (int i = threadIdx.x; i < k; i += blockDim.x) sum += matrix[int64_t{i} * k + i];
  return sum_of_all(sum, slots);
}

// A matrix divided by a power of two near its largest element, so that no square overflows. A
// matrix that is not finite becomes zero.
template <class T>
struct Scaled {
  const T* w;
  double inverse;  // 1 / the power of two
  GATEDRNN_DEVICE double operator()(int64_t i) const {
    return inverse > 0 ? static_cast<double>(w[i]) * inverse : 0;
  }
};
template <class T>
GATEDRNN_DEVICE Scaled<T> scaled(const T* w, int64_t size, double* slots) {
  double largest = 0;
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
    const double magnitude = fabs(static_cast<double>(w[i]));
    largest = magnitude <= largest ? largest : magnitude == magnitude ? magnitude : HUGE_VAL;
  }
  largest = largest_of_all(largest, slots);
  return {w, largest < HUGE_VAL ? inverse_power(largest) : 0};
}

// Finds sigma, u and v from a power of the Gram matrix, and writes the clamped matrix. `u` and `v`
// are memory for k values each.
template <class T>
GATEDRNN_DEVICE void finish(const ClampArgs& a, int64_t number, const double* power, double inverse,
                            const double* w, double* slots, double* u, double* v) {
  const int k = static_cast<int>(a.k), warps = blockDim.x / kWarp;
  const auto diagonal = [&](int64_t i) { return power[i * k + i]; };
  const auto for_each = [&](int64_t count, const auto& body) {
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) body(i);
  };
  // The column of the largest diagonal element is the longest.
  double largest = 0;
  for_each(k, [&](int64_t i) { largest = largest < diagonal(i) ? diagonal(i) : largest; });
  largest = largest_of_all(largest, slots);
  int64_t column = k - 1;
  for_each(k, [&](int64_t i) { column = i < column && diagonal(i) == largest ? i : column; });
  column = combined(column, slots, [](int64_t a, int64_t b) { return a < b ? a : b; });
  double squares = 0;
  for_each(k, [&](int64_t i) { squares += power[i * k + column] * power[i * k + column]; });
  squares = sum_of_all(squares, slots);
  // Any vector serves a zero matrix.
  const double of_v = squares > 0 ? 1 / sqrt(squares) : 0;
  for_each(k, [&](int64_t i) { v[i] = of_v > 0 ? power[i * k + column] * of_v : i == 0; });
  __syncthreads();
  for (int64_t row = threadIdx.x / kWarp; row < k; row += warps) {
    double sum = 0;
    for (int i = threadIdx.x % kWarp; i < k; i += kWarp) sum += w[row * k + i] * v[i];
    for (int apart = kWarp / 2; apart > 0; apart /= 2)
      sum += __shfl_xor_sync(0xffffffff, sum, apart);
    if (threadIdx.x % kWarp == 0) u[row] = sum;
  }
  __syncthreads();
  squares = 0;
  for_each(k, [&](int64_t i) { squares += u[i] * u[i]; });
  const double length = sqrt(sum_of_all(squares, slots));
  const double sigma = inverse > 0 ? length / inverse : nan("");

  const double factor = sigma <= 1 ? 1 : 1 / sigma;
  const int64_t begin = number * k * k;
  for_each(int64_t{k} * k, [&](int64_t i) {
    const T given = static_cast<const T*>(a.weight)[begin + i];
    static_cast<T*>(a.clamped)[begin + i] = static_cast<T>(static_cast<double>(given) * factor);
  });
  if (a.kept == nullptr) return;
  double* const kept = a.kept + number * (1 + 2 * k);
  if (threadIdx.x == 0) kept[0] = sigma;
  for_each(k, [&](int64_t i) {
    kept[1 + i] = length > 0 ? u[i] / length : i == 0;
    kept[1 + k + i] = v[i];
  });
}

// ---- a block for each matrix -------------------------------------------------------------------

size_t clamp_bytes(int64_t k) { return (kSlots + 3 * k * k + 2 * k) * sizeof(double); }

// A thread for each element, up to the maximum.
dim3 threads_for(int64_t k) {
  const int64_t warps = ceil_div(k * k, kWarp);
  return dim3(static_cast<unsigned>((warps < kSlots ? warps : kSlots) * kWarp));
}

template <class T>
__global__ void __launch_bounds__(kMostThreads) clamp_small_kernel(const ClampArgs a) {
  const int k = static_cast<int>(a.k), size = k * k;
  double* const slots = reinterpret_cast<double*>(dynamic_shared_memory());
  double *const w = slots + kSlots, *const u = w + size, *const v = u + k;
  double *power = v + k, *next = power + size;
  const Scaled<T> from =
      scaled(static_cast<const T*>(a.weight) + int64_t{blockIdx.x} * size, size, slots);
  const auto for_each = [&](const auto& body) {
    for (int i = threadIdx.x; i < size; i += blockDim.x) body(i, i / k, i % k);
  };
  for_each([&](int i, int, int) { w[i] = from(i); });
  __syncthreads();
  for_each([&](int i, int row, int column) {  // w^T w
    double sum = 0;
    for (int j = 0; j < k; ++j) sum += w[j * k + row] * w[j * k + column];
    power[i] = sum;
  });
  __syncthreads();
  double trace = trace_of(power, k, slots);
  for (int n = 0; n < kMaxSquarings; ++n) {
    const double factor = inverse_power(trace);
    for_each([&](int i, int row, int column) {
      double sum = 0;
      for (int j = 0; j < k; ++j) sum += power[row * k + j] * power[j * k + column];
      next[i] = sum * factor * factor;
    });
    __syncthreads();
    const double next_trace = trace_of(next, k, slots);
    const double of_power = 1 / trace, of_next = 1 / next_trace;
    bool changes = false;
    for_each([&](int i, int, int) {
      changes |= fabs(next[i] * of_next - power[i] * of_power) > kTolerance;
    });
    double* const swapped = power;
    power = next, next = swapped, trace = next_trace;
    if (!__syncthreads_or(changes)) break;
  }
  finish<T>(a, blockIdx.x, power, from.inverse, w, slots, u, v);
}

template <class T>
int64_t clamp_spectral(const ClampArgs& a, void* memory, cudaStream_t stream) {
  if (a.k > kMaxSize)
    throw std::runtime_error("gatedrnn: clamp_spectral takes blocks of at most " +
                             std::to_string(kMaxSize) + " channels on a GPU, got " +
                             std::to_string(a.k) + "; use gatedrnn.norms.clamp_norm");
  if (memory == nullptr) return 1;  // not 0: a null workspace asks for the bytes
  launch(clamp_small_kernel<T>, dim3(static_cast<unsigned>(a.blocks)), threads_for(a.k),
         clamp_bytes(a.k), stream, a);
  check_launch("clamp_small_kernel");
  return 1;
}

// ---- the derivative ----------------------------------------------------------------------------

// The derivative of w / sigma, where d sigma = u^T dw v. A thread block owns one matrix. Threads
// own elements, coalesced. Sums accumulate in double, in shared memory.
template <class T>
__global__ void __launch_bounds__(kMostThreads) clamp_backward_kernel(const ClampBackwardArgs a) {
  const int64_t k = a.k, size = k * k, begin = blockIdx.x * size;
  const T* const w = static_cast<const T*>(a.weight) + begin;
  const T* const grad = static_cast<const T*>(a.grad) + begin;
  T* const result = static_cast<T*>(a.dweight) + begin;
  const double* const kept = a.kept + blockIdx.x * (1 + 2 * k);
  const double *const u = kept + 1, *const v = u + k;
  const double sigma = kept[0];
  double along = 0;
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x)
    along += static_cast<double>(grad[i]) * static_cast<double>(w[i]);
  along = sum_of_all(along, reinterpret_cast<double*>(dynamic_shared_memory()));
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
    const double of_clamped = static_cast<double>(grad[i]);
    result[i] = sigma <= 1
                    ? grad[i]
                    : static_cast<T>((of_clamped - along / sigma * u[i / k] * v[i % k]) / sigma);
  }
}

template <class T>
int64_t clamp_spectral_backward(const ClampBackwardArgs& a, void* memory, cudaStream_t stream) {
  if (memory == nullptr) return 1;  // not 0: a null workspace asks for the bytes
  launch(clamp_backward_kernel<T>, dim3(static_cast<unsigned>(a.blocks)), threads_for(a.k),
         kSlots * sizeof(double), stream, a);
  check_launch("clamp_backward_kernel");
  return 1;
}

}  // namespace

int64_t clamp_spectral(const ClampArgs& a, void* workspace, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  return a.is_double ? clamp_spectral<double>(a, workspace, queue)
                     : clamp_spectral<float>(a, workspace, queue);
}
int64_t clamp_spectral_backward(const ClampBackwardArgs& a, void* workspace, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  return a.is_double ? clamp_spectral_backward<double>(a, workspace, queue)
                     : clamp_spectral_backward<float>(a, workspace, queue);
}

}  // namespace gatedrnn::cuda
