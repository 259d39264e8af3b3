// Chooses how a forward pass is computed, by the scan's shape. csrc/README.md tells why.
#include <cstdlib>

#include "cuda/forward.cuh"

namespace gatedrnn::cuda {
namespace {

enum class Way { kWavefront, kStrips, kChunks };

Way best_way(const ScanArgs& a) {
  const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
  if (can_use_strips(a)) {
    // Few: a line's latency counts. Many, of one direction: nothing could be shared with another.
    const bool few = strip_count(a) <= 2 * processors;
    if (a.directions == 1 ? !few || !can_use_chunks(a) : few && !can_use_chunks(a))
      return Way::kStrips;
  }
  return can_use_chunks(a) ? Way::kChunks : Way::kWavefront;
}

// Tests and measurements force a way.
Way forced_way(const std::string& name, const ScanArgs& a) {
  if (name == "wavefront") return Way::kWavefront;
  if (name == "strips" && can_use_strips(a)) return Way::kStrips;
  if (name == "chunks" && can_use_chunks(a)) return Way::kChunks;
  if (name == "strips" || name == "chunks")
    throw std::runtime_error("gatedrnn: GATEDRNN_FORWARD is " + name +
                             ", which cannot serve this scan: unset it");
  throw std::runtime_error("gatedrnn: GATEDRNN_FORWARD must be wavefront, strips or chunks, got '" +
                           name + "'");
}

}  // namespace

int64_t forward(const ScanArgs& a, void* workspace, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const char* const forced = std::getenv("GATEDRNN_FORWARD");
  switch (forced && *forced ? forced_way(forced, a) : best_way(a)) {
    case Way::kStrips:
      return forward_by_strips(a, workspace, queue);
    case Way::kChunks:
      return forward_by_chunks(a, workspace, queue);
    case Way::kWavefront:
      break;
  }
  return a.dtype == Dtype::kFloat64 ? forward_by_wavefront<double>(a, workspace, queue)
                                    : forward_by_wavefront<float>(a, workspace, queue);
}

}  // namespace gatedrnn::cuda
