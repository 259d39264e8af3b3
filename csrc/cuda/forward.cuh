// The three ways of a forward pass; forward.cu chooses. Each returns the bytes of its workspace.
#pragma once

#include "cuda/launch.cuh"

namespace gatedrnn::cuda {

// Any scan: tiles of two directions at a time, which wait for their neighbours.
template <class A>
int64_t forward_by_wavefront(const ScanArgs& a, void* workspace, cudaStream_t stream);

// Few lines, or one direction: each strip of lines of each direction walks by itself.
bool can_use_strips(const ScanArgs& a);
int64_t strip_count(const ScanArgs& a);
int64_t forward_by_strips(const ScanArgs& a, void* workspace, cudaStream_t stream);

// Diagonal weights without a nonlinearity: lines are cut into chunks, which do not wait.
bool can_use_chunks(const ScanArgs& a);
int64_t forward_by_chunks(const ScanArgs& a, void* workspace, cudaStream_t stream);

// The wavefront's kernel; the backward pass runs it for the states at the tiles' borders.
template <class A>
struct WavefrontParams {
  ScanArgs a;  // y null: only the states at the borders are wanted
  TilePlan p;
  Flags flags;
  Borders<A> borders;
  // What the first pass leaves of y for the second, laid out as y: of x's dtype for a maximum,
  // which rounding does not change, else of the state's.
  void* share;

  // Two passes share y; with merge none every direction has a map of its own.
  GATEDRNN_INLINE bool passes_share_y() const { return a.merge != Merge::kNone && p.passes == 2; }
};
// Shared memory: x, g, and h for rows and for columns where it is wanted.
template <class T>
size_t wavefront_bytes(const ScanArgs& a, bool keeps_states) {
  return shared_bytes<T>(a, keeps_states || T::kNeedsStates ? 3 : 1);
}
// tile_kernels.cu
template <class T>
void launch_wavefront(WavefrontParams<typename T::Value> params, cudaStream_t stream);

}  // namespace gatedrnn::cuda
