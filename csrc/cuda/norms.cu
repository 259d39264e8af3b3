// The largest singular value of each block of a weight, as cpu/norms.cpp finds it: without LAPACK,
// whose calls would wait for the device.
#include "cuda/values.h"

namespace gatedrnn::cuda {
namespace {

constexpr int kThreads = 512;

// A block of threads owns one matrix; threads share out its elements. `scratch`: two k x k
// matrices, in shared memory where they fit, else in global; in shared memory also u, v and a value
// of each thread.
template <class T>
__global__ void __launch_bounds__(kThreads) singular_kernel(const SingularArgs a, double* scratch) {
  const int k = static_cast<int>(a.k), size = k * k;
  double* const largest_of = reinterpret_cast<double*>(dynamic_shared_memory());
  double* const u = largest_of + kThreads;
  double* const v = u + k;
  double* power = scratch ? scratch + int64_t{blockIdx.x} * 2 * size : v + k;
  double* next = power + size;
  const T* const w = static_cast<const T*>(a.weight) + int64_t{blockIdx.x} * size;
  const auto for_each = [](int count, const auto& body) {
    for (int i = threadIdx.x; i < count; i += kThreads) body(i);
    __syncthreads();
  };

  // In units of the largest element, so that no square can overflow. Infinite if one is not finite.
  double unit = 0;
  for (int i = threadIdx.x; i < size; i += kThreads) {
    const double magnitude = fabs(static_cast<double>(w[i]));
    unit = magnitude <= unit ? unit : magnitude == magnitude ? magnitude : HUGE_VAL;
  }
  largest_of[threadIdx.x] = unit;
  __syncthreads();
  for (int i = 0; i < kThreads; ++i) unit = largest_of[i] > unit ? largest_of[i] : unit;
  const bool finite = unit < HUGE_VAL;
  const double inverse = unit > 0 ? 1 / unit : 0;
  for_each(size, [&](int i) {  // w^T w
    double sum = 0;
    for (int r = 0; r < k; ++r)
      sum += (static_cast<double>(w[r * k + i / k]) * inverse) *
             (static_cast<double>(w[r * k + i % k]) * inverse);
    power[i] = sum;
  });
  for (int n = 0; n < kSquarings; ++n) {
    double largest = 0;
    for (int i = 0; i < k; ++i) largest = power[i * k + i] > largest ? power[i * k + i] : largest;
    const double factor = largest > 0 ? 1 / largest : 0;
    for_each(size, [&](int i) {
      double sum = 0;
      for (int j = 0; j < k; ++j)
        sum += (power[i / k * k + j] * factor) * (power[j * k + i % k] * factor);
      next[i] = sum;
    });
    double* const swapped = power;
    power = next, next = swapped;
  }
  int column = 0;  // the column of the largest diagonal element is the longest
  for (int i = 1; i < k; ++i)
    if (power[i * k + i] > power[column * k + column]) column = i;
  double squares = 0;
  for (int i = 0; i < k; ++i) squares += power[i * k + column] * power[i * k + column];
  // A zero matrix has any vector for its own.
  for_each(k, [&](int i) {
    v[i] = squares > 0 ? power[i * k + column] / sqrt(squares) : (i == 0 ? 1.0 : 0.0);
  });
  for_each(k, [&](int i) {
    double sum = 0;
    for (int j = 0; j < k; ++j) sum += static_cast<double>(w[i * k + j]) * inverse * v[j];
    u[i] = sum;
  });
  squares = 0;
  for (int i = 0; i < k; ++i) squares += u[i] * u[i];
  const double length = sqrt(squares), sigma = finite ? length * unit : nan("");

  if (a.clamped) {
    const double factor = sigma <= 1 ? 1 : 1 / sigma;
    for_each(size, [&](int i) {
      static_cast<T*>(a.clamped)[int64_t{blockIdx.x} * size + i] =
          static_cast<T>(static_cast<double>(w[i]) * factor);
    });
    return;
  }
  if (threadIdx.x == 0) a.sigma[blockIdx.x] = sigma;
  for_each(k, [&](int i) {
    a.u[int64_t{blockIdx.x} * k + i] = length > 0 ? u[i] / length : (i == 0 ? 1.0 : 0.0);
    a.v[int64_t{blockIdx.x} * k + i] = v[i];
  });
}

}  // namespace

int64_t top_singular(const SingularArgs& a, void* workspace, void* stream) {
  const int64_t vectors = (kThreads + 2 * a.k) * int64_t{sizeof(double)};
  const int64_t matrices = 2 * a.k * a.k * int64_t{sizeof(double)};
  const bool fits = vectors + matrices <= device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int64_t bytes = fits ? 1 : matrices * a.blocks;  // never none: null asks for the number
  if (workspace == nullptr) return bytes;
  const auto kernel = a.is_double ? singular_kernel<double> : singular_kernel<float>;
  const auto shared = static_cast<size_t>(fits ? vectors + matrices : vectors);
  allow_shared_memory(kernel, shared);
  launch(kernel, dim3(static_cast<unsigned>(a.blocks)), dim3(kThreads), shared,
         static_cast<cudaStream_t>(stream), a, fits ? nullptr : static_cast<double*>(workspace));
  check_launch("singular_kernel");
  return bytes;
}

}  // namespace gatedrnn::cuda
