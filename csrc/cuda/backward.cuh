// The backward pass: its plan, and its kernel, which is compiled for one kind of steps at a time.
#pragma once

#include "cuda/launch.cuh"

namespace gatedrnn::cuda {

// Partial sums of dweight and dbias: [direction][channel tile][slot][channel][K + 1], where the
// last of K + 1 is dbias. A slot is what one warp of a tile, or a chain of tiles, has added.
struct WeightSums {
  int64_t groups, slots, values;  // direction and channel tile; slots of each; sums of a slot
  int64_t channels, k;            // of a tile; of the weight's blocks

  int64_t count() const { return groups * slots * values; }
  // Slots are added in batches, side by side, and then these.
  GATEDRNN_INLINE int64_t batch() const {
    const int64_t even = ceil_div(slots, 64);
    return even > 64 ? even : 64;
  }
  GATEDRNN_INLINE int64_t batches() const { return ceil_div(slots, batch()); }
};

// Adds the slots and writes dweight and dbias, those that are wanted. `totals`: workspace, for
// every group and batch the values of a slot.
template <class A>
void add_weight_sums(const BackwardArgs& a, const WeightSums& s, const A* sums, double* totals,
                     cudaStream_t stream);

// dg of gates that serve all channels: `sums` (channel tile, then as dg in memory) are added.
template <class A>
void add_gate_sums(const BackwardArgs& a, int64_t channel_tiles, const A* sums,
                   cudaStream_t stream);

// A map of gradients: where it is, and where the first pass leaves its share for the second.
template <class A>
struct GradientMap {
  void* result;
  A* share;
  Dtype dtype;
};

template <class A>
struct BackwardParams {
  BackwardArgs a;
  TilePlan p;  // from_end is that of the walk: against the directions
  Flags flags;
  Borders<A> states, adjoints;  // h and e at the tiles' borders
  GradientMap<A> dx, dg;
  int64_t gate_tile_size;  // of dg, where each channel tile has its own, to be summed afterwards
  A* weight_sums;          // null if neither dweight nor dbias is wanted
  WeightSums sums;
};

// Shared memory: x, dL/dy or dx, h or dg and e, for rows and for columns.
template <class T>
size_t backward_bytes(const ScanArgs& a) {
  return shared_bytes<T>(a, T::kInPlace ? 4 : 8);
}
// tile_kernels.cu
template <class T>
void launch_backward(BackwardParams<typename T::Value> params, cudaStream_t stream);

}  // namespace gatedrnn::cuda
