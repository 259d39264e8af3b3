// Chooses how a forward pass is computed, by the scan's shape. csrc/README.md tells why.
#include "cuda/forward.cuh"

namespace gatedrnn::cuda {

int64_t forward(const ScanArgs& a, void* workspace, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
  if (can_use_strips(a)) {
    // Few: a line's latency counts. Many, of one direction: nothing could be shared with another.
    const bool few = strip_count(a) <= 2 * processors;
    if (a.directions == 1 ? !few || !can_use_chunks(a) : few && !can_use_chunks(a))
      return forward_by_strips(a, workspace, queue);
  }
  if (can_use_chunks(a)) return forward_by_chunks(a, workspace, queue);
  return a.dtype == Dtype::kFloat64 ? forward_by_wavefront<double>(a, workspace, queue)
                                    : forward_by_wavefront<float>(a, workspace, queue);
}

}  // namespace gatedrnn::cuda
