#include "cuda/backward.cuh"

namespace gatedrnn::cuda {
namespace {

constexpr int kLanes = 32, kParts = 8;

// A block adds a batch of slots, for 32 values of a group. Thread (lane, part) adds one value of
// every eighth slot, in double. Loads are coalesced along the values. Shared memory holds the eight
// parts.
template <class A>
__global__ void __launch_bounds__(kLanes* kParts)
    slots_kernel(WeightSums s, const A* sums, double* totals) {
  double* const parts = reinterpret_cast<double*>(dynamic_shared_memory());
  const int lane = threadIdx.x % kLanes, part = threadIdx.x / kLanes;
  const int64_t columns = ceil_div(s.values, kLanes), batch = s.batch(), batches = s.batches();
  const int64_t value = blockIdx.x % columns * kLanes + lane, group_batch = blockIdx.x / columns;
  const int64_t group = group_batch / batches, begin = group_batch % batches * batch;
  const int64_t end = begin + batch < s.slots ? begin + batch : s.slots;
  double sum = 0;
  if (value < s.values) {
    const A* const from = sums + group * s.slots * s.values + value;
#pragma unroll 8
    for (int64_t i = begin + part; i < end; i += kParts)
      sum += static_cast<double>(from[i * s.values]);
  }
  parts[threadIdx.x] = sum;
  __syncthreads();
  if (part > 0 || value >= s.values) return;
  for (int i = 1; i < kParts; ++i) sum += parts[i * kLanes + lane];
  totals[group_batch * s.values + value] = sum;
}

// A thread adds the batches of one value, in double, and writes the result.
template <class A>
__global__ void batches_kernel(BackwardArgs a, WeightSums s, const double* totals) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= s.groups * s.values) return;
  const int64_t group = i / s.values, value = i % s.values;
  const int64_t channel_tiles = s.groups / a.directions;
  const int64_t d = group / channel_tiles;
  const int64_t c = group % channel_tiles * s.channels + value / (s.k + 1), k = value % (s.k + 1);
  if (c >= a.c) return;
  const int64_t batches = s.batches();
  double sum = 0;
#pragma unroll 8
  for (int64_t j = 0; j < batches; ++j) sum += totals[(group * batches + j) * s.values + value];
  if (k == s.k) {
    if (a.dbias) static_cast<A*>(a.dbias)[d * a.c + c] = static_cast<A>(sum);
  } else if (a.dweight) {
    static_cast<A*>(a.dweight)[(d * a.c + c) * s.k + k] = static_cast<A>(sum);
  }
}

// A thread adds the gate gradient of one pixel over the channel tiles.
template <class A>
__global__ void gates_kernel(BackwardArgs a, int64_t channel_tiles, const A* sums) {
  const int64_t directions = a.gate_directions ? a.directions : 1, pixels = a.h * a.w;
  const int64_t count = a.n * directions * pixels;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int64_t n = i / pixels / directions, d = i / pixels % directions;
  const int64_t h = i % pixels / a.w, w = i % a.w;
  const auto at = [&](const Strides& s) { return n * s.n + d * s.d + h * s.h + w * s.w; };
  A sum = 0;
  for (int64_t c = 0; c < channel_tiles; ++c) sum += sums[c * count + at(a.dg_strides)];
  dispatch_storage<A>(a.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    static_cast<S*>(a.dg)[at(a.dg_strides)] = to_storage<S>(sum);
  });
}

constexpr int kThreads = 256;
dim3 blocks_for(int64_t count) { return dim3(static_cast<unsigned>(ceil_div(count, kThreads))); }

}  // namespace

template <class A>
void add_weight_sums(const BackwardArgs& a, const WeightSums& s, const A* sums, double* totals,
                     cudaStream_t stream) {
  const int64_t group_batches = s.groups * s.batches(), columns = ceil_div(s.values, kLanes);
  launch(slots_kernel<A>, dim3(static_cast<unsigned>(group_batches * columns)),
         dim3(kLanes * kParts), kLanes * kParts * sizeof(double), stream, s, sums, totals);
  check_launch("slots_kernel");
  launch(batches_kernel<A>, blocks_for(s.groups * s.values), dim3(kThreads), 0, stream, a, s,
         static_cast<const double*>(totals));
  check_launch("batches_kernel");
}

template <class A>
void add_gate_sums(const BackwardArgs& a, int64_t channel_tiles, const A* sums,
                   cudaStream_t stream) {
  const int64_t count = a.n * (a.gate_directions ? a.directions : 1) * a.h * a.w;
  launch(gates_kernel<A>, blocks_for(count), dim3(kThreads), 0, stream, a, channel_tiles, sums);
  check_launch("gates_kernel");
}

template void add_weight_sums<float>(const BackwardArgs&, const WeightSums&, const float*, double*,
                                     cudaStream_t);
template void add_weight_sums<double>(const BackwardArgs&, const WeightSums&, const double*,
                                      double*, cudaStream_t);
template void add_gate_sums<float>(const BackwardArgs&, int64_t, const float*, cudaStream_t);
template void add_gate_sums<double>(const BackwardArgs&, int64_t, const double*, cudaStream_t);

}  // namespace gatedrnn::cuda
