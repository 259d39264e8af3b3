// The ordered sums that end a backward pass: no atomics, the same order on every run.
#pragma once

#include "cuda/launch.h"

namespace gatedrnn::cuda {

// Partial sums of dweight and dbias: [direction][channel tile][slot][channel][K + 1], where the
// last of K + 1 is dbias. A slot is what one warp of a tile, or a chain of tiles, has added.
struct WeightSums {
  int64_t groups, slots, values;  // direction and channel tile; slots of each; sums of a slot
  int64_t channels, k;            // of a tile; of the weight's blocks

  int64_t count() const { return groups * slots * values; }
  // Slots are added in chunks, side by side, and then these.
  GATEDRNN_INLINE int64_t chunk() const {
    const int64_t even = ceil_div(slots, 64);
    return even > 64 ? even : 64;
  }
  GATEDRNN_INLINE int64_t chunks() const { return ceil_div(slots, chunk()); }
};

// Adds the slots and writes dweight and dbias, those that are wanted. `totals`: workspace, for
// every group and chunk the values of a slot.
template <class A>
void add_weight_sums(const BackwardArgs& a, const WeightSums& s, const A* sums, double* totals,
                     cudaStream_t stream);

// dg of gates that serve all channels: `sums` (channel tile, then as dg in memory) are added.
template <class A>
void add_gate_sums(const BackwardArgs& a, int64_t channel_tiles, const A* sums,
                   cudaStream_t stream);

}  // namespace gatedrnn::cuda
