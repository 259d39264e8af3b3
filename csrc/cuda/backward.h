// The backward pass: its plan, and its kernel, which is compiled for one kind of steps at a time.
#pragma once

#include "cuda/launch.h"
#include "cuda/sums.h"

namespace gatedrnn::cuda {

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
// steps_*.cu
template <class T>
void launch_backward(BackwardParams<typename T::Value> params, cudaStream_t stream);

}  // namespace gatedrnn::cuda
