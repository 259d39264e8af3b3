// The backward pass: the parameters of its kernel, and its ordered sums. No atomics: every run adds
// in the same order.
#pragma once

#include "cuda/launch.cuh"

namespace gatedrnn::cuda {

// Partial sums of dweight and dbias: [direction][channel tile][slot][channel][K + 1]. The last of
// the K + 1 is dbias. One warp of a tile, or a chain of tiles, adds to one slot.
struct WeightSums {
  int64_t groups, slots,
      values;           // pairs of direction and channel tile; slots of a group; sums in a slot
  int64_t channels, k;  // channels of a tile; the weight's block size

  int64_t count() const { return groups * slots * values; }
  // Batches of slots are added in parallel, then their totals.
  GATEDRNN_INLINE int64_t batch() const {
    const int64_t even = ceil_div(slots, 64);
    return even > 64 ? even : 64;
  }
  GATEDRNN_INLINE int64_t batches() const { return ceil_div(slots, batch()); }
};

// Adds the slots and writes dweight and dbias where these are wanted. `totals` is workspace for one
// slot's values, for every group and batch.
template <class A>
void add_weight_sums(const BackwardArgs& a, const WeightSums& s, const A* sums, double* totals,
                     cudaStream_t stream);

// Adds `sums` over the channel tiles: dg of gates that serve all channels. Each tile's map is laid
// out as dg.
template <class A>
void add_gate_sums(const BackwardArgs& a, int64_t channel_tiles, const A* sums,
                   cudaStream_t stream);

// A map of gradients. The first pass stores its part in `share`, for the second pass.
template <class A>
struct GradientMap {
  void* result;
  A* share;
  Dtype dtype;
};

template <class A>
struct BackwardParams {
  BackwardArgs a;
  TilePlan p;  // from_end is that of this pass: against the directions
  Flags flags;
  Borders<A> states, adjoints;  // h and e at the borders of tiles
  GradientMap<A> dx, dg;
  int64_t gate_tile_size;  // size of one channel tile's own dg map; 0 if all tiles share dg
  A* weight_sums;          // null if neither dweight nor dbias is wanted
  WeightSums sums;
};

// Shared memory, for rows and for columns each: x; dL/dy, then dx; h, then dg; and e.
template <class T>
size_t backward_bytes(const ScanArgs& a) {
  return shared_bytes<T>(a, T::kInPlace ? 4 : 8);
}
// Defined in tile_kernels.cu.
template <class T>
void launch_backward(BackwardParams<typename T::Value> params, cudaStream_t stream);

}  // namespace gatedrnn::cuda
