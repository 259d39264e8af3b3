// The forward kernel's parameters; the backward pass runs it for the states at the tiles' borders.
#pragma once

#include "cuda/launch.h"

namespace gatedrnn::cuda {

template <class A>
struct ForwardParams {
  ScanArgs a;  // y null: only the states at the borders are wanted
  TilePlan p;
  Flags flags;
  Borders<A> borders;
  A* share;  // what the first pass leaves of y for the second, laid out as y
};

template <class A, class T>
int64_t forward_planes(const ScanArgs& a) {
  return 3 * T::channels(a.block) + gate_planes<T>(a);
}

template <class A, class T>
void launch_forward(ForwardParams<A> params, cudaStream_t stream);

}  // namespace gatedrnn::cuda
