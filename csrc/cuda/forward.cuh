// The three ways of a forward pass. forward.cu chooses one. Each returns the bytes of its
// workspace.
#pragma once

#include "cuda/launch.cuh"

namespace gatedrnn::cuda {

// Wavefront, for any scan: a visit to a tile serves two directions, and waits for its neighbours.
template <class A>
int64_t forward_by_wavefront(const ScanArgs& a, void* workspace, cudaStream_t stream);

// Strips, for few lines or one direction: a block walks along one strip of lines.
bool can_use_strips(const ScanArgs& a);
int64_t strip_count(const ScanArgs& a);
int64_t forward_by_strips(const ScanArgs& a, void* workspace, cudaStream_t stream);

// Chunks, for diagonal weights without a nonlinearity: the chunks of a line do not wait.
bool can_use_chunks(const ScanArgs& a);
int64_t forward_by_chunks(const ScanArgs& a, void* workspace, cudaStream_t stream);

// The wavefront kernel. The backward pass runs it too, for the carries.
template <class A>
struct WavefrontParams {
  ScanArgs a;  // y is null if only the carries are wanted
  TilePlan p;
  Flags flags;
  Borders<A> borders;
  // The first pass's result for the second pass, laid out as y. It has x's dtype for a maximum,
  // which rounding does not change. Otherwise it has the state's type.
  void* share;

  // Whether two passes merge in y. Without a merge, every direction has its own map.
  GATEDRNN_INLINE bool passes_share_y() const { return a.merge != Merge::kNone && p.passes == 2; }
};
// Shared memory: x, g, and h for rows and for columns where it is kept.
template <class T>
size_t wavefront_bytes(const ScanArgs& a, bool keeps_states) {
  return shared_bytes<T>(a, keeps_states || T::kNeedsStates ? 3 : 1);
}
// Defined in tile_kernels.cu.
template <class T>
void launch_wavefront(WavefrontParams<typename T::Value> params, cudaStream_t stream);

}  // namespace gatedrnn::cuda
