// Chooses how a forward pass is computed. docs/how-it-works/cuda.md describes the three ways.
#include <cstdlib>

#include "cuda/forward.cuh"

namespace gatedrnn::cuda {
namespace {

enum class Way { kChunks, kStrips, kWavefront };

// A strip occupies one block. Up to this many for each multiprocessor leave most of the GPU idle.
constexpr int64_t kFewStripsPerMultiprocessor = 2;

Way choose_way(const ScanArgs& a) {
  const bool chunks = can_use_chunks(a), strips = can_use_strips(a);
  const bool one_direction = a.directions == 1;
  const int64_t few =
      kFewStripsPerMultiprocessor * device_attribute(cudaDevAttrMultiProcessorCount);
  const bool few_strips = strips && strip_count(a) <= few;
  // The first row that applies.
  const struct {
    Way way;
    bool applies;
  } table[] = {
      // clang-format off
      // way            condition                  reason
      {Way::kChunks,    chunks && !one_direction}, // one visit to a tile serves all directions
      {Way::kChunks,    chunks && few_strips},     // chunks of a line run in parallel
      {Way::kStrips,    strips && one_direction},  // no second direction could share a tile
      {Way::kStrips,    strips && few_strips},     // only the latency of a line counts
      {Way::kChunks,    chunks},                   // tiles of strips do not fit in shared memory
      {Way::kWavefront, true},                     // any scan; a visit serves two directions
      // clang-format on
  };
  for (const auto& row : table)
    if (row.applies) return row.way;
  return Way::kWavefront;
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
  switch (forced && *forced ? forced_way(forced, a) : choose_way(a)) {
    case Way::kChunks:
      return forward_by_chunks(a, workspace, queue);
    case Way::kStrips:
      return forward_by_strips(a, workspace, queue);
    case Way::kWavefront:
      break;
  }
  return a.dtype == Dtype::kFloat64 ? forward_by_wavefront<double>(a, workspace, queue)
                                    : forward_by_wavefront<float>(a, workspace, queue);
}

}  // namespace gatedrnn::cuda
