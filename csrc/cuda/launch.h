// Host side: which steps serve a scan, and the temporary memory of a call.
#pragma once

#include "cuda/general_steps.h"
#include "cuda/wavefront.h"

namespace gatedrnn::cuda {

// Hands out pieces of one allocation; without memory it only counts.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    const int64_t begin = bytes_;
    bytes_ += (count * int64_t{sizeof(T)} + kAlign - 1) / kAlign * kAlign;
    return memory_ ? reinterpret_cast<T*>(memory_ + begin) : nullptr;
  }
  int64_t bytes() const { return bytes_; }
  bool counts_only() const { return memory_ == nullptr; }

 private:
  static constexpr int64_t kAlign = 256;
  char* memory_;
  int64_t bytes_ = 0;
};

// States at the borders of tiles, of each direction in the caller's list.
template <class A>
struct Borders {
  A* states[kDirections];
};
template <class A>
Borders<A> take_borders(Workspace& workspace, const ScanArgs& a, const TilePlan& p) {
  Borders<A> borders{};
  for (int d = 0; d < a.directions; ++d)
    borders.states[d] = workspace.take<A>(a.n * a.c * p.border_size());
  return borders;
}

inline Flags take_flags(Workspace& workspace, const TilePlan& p, cudaStream_t stream) {
  int* const memory = workspace.take<int>(Flags::count(p));
  if (!workspace.counts_only())
    check(cudaMemsetAsync(memory, 0, Flags::count(p) * sizeof(int), stream), "cudaMemsetAsync");
  return Flags::at(memory, p);
}

// Shared memory: what a block says of its task, then tiles.
template <class T>
size_t shared_bytes(int64_t planes) {
  return static_cast<size_t>(planes) * T::kPlane * sizeof(typename T::Value) + kTilesBegin;
}
// Planes of the gate's tiles: one for each channel or for all, and for both axes where they differ.
template <class T>
int64_t gate_planes(const ScanArgs& a) {
  const int64_t channels = a.gate_channels ? T::channels(a.block) : 1;
  return a.gate_directions ? 2 * channels : channels;
}

// Whether that many planes fit into the device's shared memory.
template <class T>
bool fits(int64_t planes) {
  return shared_bytes<T>(planes) <=
         static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// Calls body.operator()<Steps>() with the first kind of steps whose tiles fit; `planes` counts
// them.
template <class... Steps, class Planes, class Body>
bool first_that_fits(const Planes& planes, const Body& body) {
  const auto attempt = [&]<class T>() {
    if (!fits<T>(planes.template operator()<T>())) return false;
    body.template operator()<T>();
    return true;
  };
  return (attempt.template operator()<Steps>() || ...);
}

// The order is that of speed: a block size known when compiled, else the largest tile.
template <class A, bool Backward, class Planes, class Body>
void choose_steps(const ScanArgs& a, const Planes& planes, const Body& body) {
  // With four channels the adjoint's weights and sums would not fit in the registers.
  using Steps16 = std::conditional_t<Backward, Steps<A, 16, 8, 2>, Steps<A, 16, 16, 4>>;
  bool found = false;
  if constexpr (std::is_same_v<A, float>) {
    switch (a.block) {
      case 1:
        found = first_that_fits<Steps<A, 1, 16, 2>>(planes, body);
        break;
      case 2:
        found = first_that_fits<Steps<A, 2, 16, 2>>(planes, body);
        break;
      case 4:
        found = first_that_fits<Steps<A, 4, 16, 2>>(planes, body);
        break;
      case 8:
        found = first_that_fits<Steps<A, 8, 16, 2>>(planes, body);
        break;
      case 16:
        found = first_that_fits<Steps16, Steps<A, 16, 8, 2>>(planes, body);
        break;
    }
  }
  found =
      found || first_that_fits<Steps<A, 0, 16, 0, 0>, Steps<A, 0, 4, 0, 0>, Steps<A, 0, 1, 0, 0>>(
                   planes, body);
  if (!found)
    throw std::runtime_error("gatedrnn: C / groups = " + std::to_string(a.block) +
                             " channels are more than this GPU's shared memory can hold");
}

}  // namespace gatedrnn::cuda
