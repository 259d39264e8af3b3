// Host code: which traits serve a scan, and its carries, flags, shared memory and workspace.
#pragma once

#include <array>

#include "cuda/general_kernel_traits.cuh"
#include "cuda/tasks.cuh"

namespace gatedrnn::cuda {

// Hands out parts of one allocation. Without memory it only counts bytes.
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

// The carries at the borders of tiles, for each direction in the caller's list.
template <class A>
struct Borders {
  A* states[kDirections];
};
template <class A>
Borders<A> take_borders(Workspace& workspace, const ScanArgs& a, const TilePlan& p) {
  Borders<A> borders{};
  for (int d = 0; d < a.directions; ++d)
    borders.states[d] = workspace.take<A>(p.units * p.border_size());
  return borders;
}

// Flags for `Kernels` kernels, cleared with one call.
template <int Kernels>
std::array<Flags, Kernels> take_flags(Workspace& workspace, const TilePlan& p,
                                      cudaStream_t stream) {
  const int64_t each = Flags::count(p);
  int* const memory = workspace.take<int>(Kernels * each);
  if (!workspace.counts_only())
    check(cudaMemsetAsync(memory, 0, Kernels * each * sizeof(int), stream), "cudaMemsetAsync");
  std::array<Flags, Kernels> flags;
  for (int i = 0; i < Kernels; ++i) flags[i] = Flags::at(memory + i * each, p);
  return flags;
}

// Shared memory: the tasks of the block, `tiles` tiles, and the gates, for each axis if they
// differ.
template <class T>
size_t shared_bytes(const ScanArgs& a, int tiles) {
  TilePlan p{};
  p.channels = T::channels(a.block);
  const int64_t gates = int64_t{a.gate_directions ? 2 : 1} * gate_size<T>(p, a);
  const int64_t values = int64_t{tiles} * T::kPixels * p.channels + gates;
  return static_cast<size_t>(values) * sizeof(typename T::Value) + kTilesBegin;
}
// Whether the device has that much shared memory.
inline bool fits(size_t bytes) {
  return bytes <= static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// Calls body.operator()<T>() with the first traits T whose tiles fit. bytes.operator()<T>() is the
// shared memory that they need.
template <class... Traits, class Bytes, class Body>
bool first_that_fits(const Bytes& bytes, const Body& body) {
  const auto attempt = [&]<class T>() {
    if (!fits(bytes.template operator()<T>())) return false;
    body.template operator()<T>();
    return true;
  };
  return (attempt.template operator()<Traits>() || ...);
}

// Traits for a block size K that the compiler knows.
template <int K>
using KnownTraits = KernelTraits<float, K, 16, (K < 16 ? 8 : 4)>;

template <class Bytes, class Body>
bool choose_known_traits(const ScanArgs& a, const Bytes& bytes, const Body& body) {
  switch (a.block) {
    case 1:
      return first_that_fits<KnownTraits<1>>(bytes, body);
    case 2:
      return first_that_fits<KnownTraits<2>>(bytes, body);
    case 4:
      return first_that_fits<KnownTraits<4>>(bytes, body);
    case 8:
      return first_that_fits<KnownTraits<8>>(bytes, body);
    case 16:
      return first_that_fits<KnownTraits<16>>(bytes, body);
  }
  return false;
}

// In order of speed: a known block size first, then the largest tile.
template <class A, class Bytes, class Body>
void choose_traits(const ScanArgs& a, const Bytes& bytes, const Body& body) {
  bool found = false;
  if constexpr (std::is_same_v<A, float>) found = choose_known_traits(a, bytes, body);
  found = found || first_that_fits<KernelTraits<A, 0, 16, 0>, KernelTraits<A, 0, 4, 0>,
                                   KernelTraits<A, 0, 1, 0>>(bytes, body);
  if (!found)
    throw std::runtime_error("gatedrnn: C / groups = " + std::to_string(a.block) +
                             " channels are more than this GPU's shared memory can hold");
}

}  // namespace gatedrnn::cuda
