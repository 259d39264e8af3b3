// The spectral clamp of each block of a weight, and its first derivative, as in cpu/norms.cpp:
// without LAPACK, whose calls would wait for the device.
//
// A small matrix is one block's from beginning to end, in shared memory. Of larger ones each
// squaring is a kernel of its own, with a block for each tile of the product: GPUs other than those
// of data centres have two units for doubles in a multiprocessor, so that it takes all of them. For
// the same reason matrices are scaled by powers of two, whose exponents are whole numbers.
#include "cuda/launch.cuh"
#include "scan.h"

namespace gatedrnn::cuda {
namespace {

constexpr int kAlone = 32;  // the largest matrix of one block
constexpr int kMostThreads = 512;
constexpr int kTile = 16, kTileThreads = kTile * kTile;
constexpr int kWarp = 32, kSlots = kMostThreads / kWarp;

// The exponent of v >= 0 as it is stored; the least one for zero.
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

// For all threads of a block: what `combine` makes of all their values, in the order of a tree.
template <class V, class Combine>
GATEDRNN_DEVICE V combined(V value, double* slots, const Combine& combine) {
  static_assert(sizeof(V) == sizeof(double));
  V* const parts = reinterpret_cast<V*>(slots);
  for (int apart = kWarp / 2; apart > 0; apart /= 2)
    value = combine(value, __shfl_xor_sync(0xffffffff, value, apart));
  __syncthreads();  // the slots are read no more
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

// The sum over the diagonal bounds every element of a Gram matrix.
GATEDRNN_DEVICE double trace_of(const double* matrix, int k, double* slots) {
  double sum = 0;
  for (int i = threadIdx.x; i < k; i += blockDim.x) sum += matrix[int64_t{i} * k + i];
  return sum_of_all(sum, slots);
}

// A matrix in units of a power of two near its largest element, so that no square can overflow. One
// that is not finite is zero there.
template <class T>
struct Scaled {
  const T* w;
  double inverse;  // of the unit
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

// What a power of the Gram matrix tells of w: w clamped and, unless null, what is kept. `u`
// and `v` are memory for k values each.
template <class T, class Element>
GATEDRNN_DEVICE void finish(const ClampArgs& a, int64_t number, const double* power, double inverse,
                            const Element& element, double* slots, double* u, double* v) {
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
  // A zero matrix has any vector for its own.
  const double of_v = squares > 0 ? 1 / sqrt(squares) : 0;
  for_each(k, [&](int64_t i) { v[i] = of_v > 0 ? power[i * k + column] * of_v : i == 0; });
  __syncthreads();
  for (int64_t row = threadIdx.x / kWarp; row < k; row += warps) {
    double sum = 0;
    for (int i = threadIdx.x % kWarp; i < k; i += kWarp) sum += element(row * k + i) * v[i];
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
    const T w = static_cast<const T*>(a.weight)[begin + i];
    static_cast<T*>(a.clamped)[begin + i] = static_cast<T>(static_cast<double>(w) * factor);
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

size_t alone_bytes(int64_t k) { return (kSlots + 3 * k * k + 2 * k) * sizeof(double); }

// A thread for each element, as far as there are so many.
dim3 threads_for(int64_t k) {
  const int64_t warps = ceil_div(k * k, kWarp);
  return dim3(static_cast<unsigned>((warps < kSlots ? warps : kSlots) * kWarp));
}

template <class T>
__global__ void __launch_bounds__(kMostThreads) alone_kernel(const ClampArgs a) {
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
  for (int n = 0; n < kSquarings; ++n) {
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
      changes |= fabs(next[i] * of_next - power[i] * of_power) > kStill;
    });
    double* const swapped = power;
    power = next, next = swapped, trace = next_trace;
    if (!__syncthreads_or(changes)) break;
  }
  finish<T>(a, blockIdx.x, power, from.inverse, [w](int64_t i) { return w[i]; }, slots, u, v);
}

// ---- a block for each tile ---------------------------------------------------------------------

// Of a matrix: the power of its Gram matrix before and after a squaring, in turns, u and v; and of
// each power the trace, and the number of tiles that are another than those of the power before.
struct Large {
  ClampArgs a;
  int tiles;  // along a row
  double *inverse, *powers, *vectors, *traces;
  int* changed;

  GATEDRNN_DEVICE double* power(int64_t number, int n) const {
    return powers + (number * 2 + n % 2) * a.k * a.k;
  }
  GATEDRNN_DEVICE int64_t at(int64_t number, int n) const { return number * kSquarings + n; }
  // Whether the powers stood still before the n-th.
  GATEDRNN_DEVICE bool is_still(int64_t number, int n) const {
    return n >= 2 && changed[at(number, n - 1)] == 0;
  }
};

// The sum over j of left(row, j) right(j, column), a thread each; for all threads of a block.
template <class Left, class Right>
GATEDRNN_DEVICE double product(int k, int row, int column, double* tiles, const Left& left,
                               const Right& right) {
  constexpr int stride = kTile + 1;
  const int x = threadIdx.x % kTile, y = threadIdx.x / kTile;
  double *const rows = tiles, *const columns = tiles + kTile * stride;
  double sum = 0;
  for (int from = 0; from < k; from += kTile) {
    rows[y * stride + x] = row < k && from + x < k ? left(row, from + x) : 0;
    columns[y * stride + x] = column < k && from + y < k ? right(from + y, column) : 0;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kTile; ++j) sum += rows[y * stride + j] * columns[j * stride + x];
    __syncthreads();
  }
  return sum;
}
constexpr size_t kProductBytes = (kSlots + 2 * kTile * (kTile + 1)) * sizeof(double);

// The place of a thread of a tile.
struct Place {
  int64_t number;
  int row, column;
  GATEDRNN_DEVICE explicit Place(int tiles) {
    const int tile = blockIdx.x % (tiles * tiles);
    number = blockIdx.x / (tiles * tiles);
    row = tile / tiles * kTile + threadIdx.x / kTile;
    column = tile % tiles * kTile + threadIdx.x % kTile;
  }
};

template <class T>
__global__ void __launch_bounds__(kTileThreads) scale_kernel(const Large f) {
  const int64_t size = f.a.k * f.a.k, number = blockIdx.x;
  const T* const w = static_cast<const T*>(f.a.weight) + number * size;
  const Scaled<T> from = scaled(w, size, reinterpret_cast<double*>(dynamic_shared_memory()));
  if (threadIdx.x == 0) f.inverse[number] = from.inverse;
}

template <class T>
__global__ void __launch_bounds__(kTileThreads) gram_kernel(const Large f) {
  const int k = static_cast<int>(f.a.k);
  const Place at(f.tiles);
  const Scaled<T> w{static_cast<const T*>(f.a.weight) + at.number * k * k, f.inverse[at.number]};
  double* const tiles = reinterpret_cast<double*>(dynamic_shared_memory()) + kSlots;
  const double sum = product(
      k, at.row, at.column, tiles, [&](int64_t row, int64_t j) { return w(j * k + row); },
      [&](int64_t j, int64_t column) { return w(j * k + column); });
  if (at.row < k && at.column < k) f.power(at.number, 0)[int64_t{at.row} * k + at.column] = sum;
}

__global__ void __launch_bounds__(kTileThreads) square_kernel(const Large f, int n) {
  const int k = static_cast<int>(f.a.k);
  const Place at(f.tiles);
  if (f.is_still(at.number, n)) return;
  double* const slots = reinterpret_cast<double*>(dynamic_shared_memory());
  const double* const power = f.power(at.number, n);
  double* const next = f.power(at.number, n + 1);  // holds the power before
  const double trace = trace_of(power, k, slots), factor = inverse_power(trace);
  double sum = product(
      k, at.row, at.column, slots + kSlots,
      [&](int64_t row, int64_t j) { return power[row * k + j]; },
      [&](int64_t j, int64_t column) { return power[j * k + column]; });
  bool changes = false;
  if (at.row < k && at.column < k) {
    const int64_t i = int64_t{at.row} * k + at.column;
    if (n > 0)
      changes = fabs(power[i] / trace - next[i] / f.traces[f.at(at.number, n - 1)]) > kStill;
    next[i] = sum * factor * factor;
  }
  if (__syncthreads_or(changes) && threadIdx.x == 0) atomicAdd(&f.changed[f.at(at.number, n)], 1);
  if (at.row == 0 && at.column == 0) f.traces[f.at(at.number, n)] = trace;
}

template <class T>
__global__ void __launch_bounds__(kTileThreads) finish_kernel(const Large f) {
  const int64_t k = f.a.k, number = blockIdx.x;
  int n = 0;
  while (n < kSquarings && !f.is_still(number, n)) ++n;
  const Scaled<T> w{static_cast<const T*>(f.a.weight) + number * k * k, f.inverse[number]};
  double* const u = f.vectors + number * 2 * k;
  finish<T>(f.a, number, f.power(number, n), w.inverse, w,
            reinterpret_cast<double*>(dynamic_shared_memory()), u, u + k);
}

template <class T>
int64_t clamp_spectral(const ClampArgs& a, void* memory, cudaStream_t stream) {
  if (a.k <= kAlone) {
    if (memory == nullptr) return 1;  // never none: null asks for the number
    launch(alone_kernel<T>, dim3(static_cast<unsigned>(a.blocks)), threads_for(a.k),
           alone_bytes(a.k), stream, a);
    check_launch("alone_kernel");
    return 1;
  }
  Workspace workspace(memory);
  const int64_t tiles = ceil_div(a.k, kTile), counts = a.blocks * kSquarings;
  Large f{};
  f.a = a;
  f.tiles = static_cast<int>(tiles);
  f.inverse = workspace.take<double>(a.blocks);
  f.powers = workspace.take<double>(a.blocks * 2 * a.k * a.k);
  f.vectors = workspace.take<double>(a.blocks * 2 * a.k);
  f.traces = workspace.take<double>(counts);
  f.changed = workspace.take<int>(counts);
  if (workspace.counts_only()) return workspace.bytes();

  check(cudaMemsetAsync(f.changed, 0, counts * sizeof(int), stream), "cudaMemsetAsync");
  const dim3 matrices(static_cast<unsigned>(a.blocks)), threads(kTileThreads);
  const dim3 all_tiles(static_cast<unsigned>(a.blocks * tiles * tiles));
  launch(scale_kernel<T>, matrices, threads, kSlots * sizeof(double), stream, f);
  check_launch("scale_kernel");
  launch(gram_kernel<T>, all_tiles, threads, kProductBytes, stream, f);
  check_launch("gram_kernel");
  for (int n = 0; n < kSquarings; ++n) {
    launch(square_kernel, all_tiles, threads, kProductBytes, stream, f, n);
    check_launch("square_kernel");
  }
  launch(finish_kernel<T>, matrices, threads, kSlots * sizeof(double), stream, f);
  check_launch("finish_kernel");
  return workspace.bytes();
}

// ---- the derivative ----------------------------------------------------------------------------

// Of w / sigma, where d sigma = u^T dw v; a block for each matrix.
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
  if (memory == nullptr) return 1;  // never none: null asks for the number
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
