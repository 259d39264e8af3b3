// Forward pass: every tile of x and g is read once for two directions, which are merged on chip.
#include "cuda/forward.h"

namespace gatedrnn::cuda {
namespace {

// Two passes share y; with merge none every direction has a map of its own.
GATEDRNN_INLINE bool passes_meet(const ScanArgs& a, const TilePlan& p) {
  return a.merge != Merge::kNone && p.passes == 2;
}

// Writes what the directions of one pass say of a tile, and what the other has said before.
template <class A, class T>
GATEDRNN_DEVICE void write_merged(const ForwardParams<A>& f, const Task& t, Visit visit,
                                  const Pair<A>& h) {
  const ScanArgs& a = f.a;
  const bool is_max = a.merge == Merge::kMax;
  const int rows = f.p.direction[t.pass][0], columns = f.p.direction[t.pass][1];
  const A scale = a.merge == Merge::kMean ? A(1) / static_cast<A>(a.directions) : A(1);
  const auto merge = [&](Winner<A> one, Winner<A> other) {
    return is_max ? better(one, other) : Winner<A>{one.value + other.value, 0};
  };
  const int64_t corner = tile_corner(f.p, t, a.y_strides, 0, t.c0);
  A* const share = f.share + corner;
  uint8_t* const mask = a.mask ? a.mask + corner : nullptr;
  with_storage<A>(a.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    S* const y = static_cast<S*>(a.y) + corner;
    for_each_element(box_of<T::kSide>(t, t.channels, a.y_strides), [&](int64_t at, int cell) {
      Winner<A> v;
      if (rows < 0)
        v = {h[1][cell], 1u << columns};
      else if (columns < 0)
        v = {h[0][cell], 1u << rows};
      else
        v = merge({h[0][cell], 1u << rows}, {h[1][cell], 1u << columns});
      if (visit == kSecond)
        v = merge(v, {load_shared_by_blocks(share + at),
                      mask ? load_shared_by_blocks(mask + at) : 0u});
      if (visit == kFirst)
        share[at] = v.value;
      else
        y[at] = to_storage<S>(v.value * scale);
      if (mask) mask[at] = static_cast<uint8_t>(v.bits);
    });
  });
}

template <class A, class T>
GATEDRNN_DEVICE void write_maps(const ForwardParams<A>& f, const Task& t,
                                const Pair<A>& h) {
  const ScanArgs& a = f.a;
  const Box box = box_of<T::kSide>(t, t.channels, a.y_strides);
  with_storage<A>(a.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    for (int axis = 0; axis < kAxes; ++axis) {
      const int d = f.p.direction[t.pass][axis];
      if (d < 0) continue;
      S* const y = static_cast<S*>(a.y) + tile_corner(f.p, t, a.y_strides, d, t.c0);
      for_each_element(box, [&](int64_t at, int cell) { y[at] = to_storage<S>(h[axis][cell]); });
    }
  });
}

// A block owns a tile at a time. Loads and stores run along whichever axis of a map is contiguous.
// Shared memory: tiles of x and g, and of h for rows and for columns, all in the state's type.
// Rows belong to the first half of the threads, columns to the second (steps.h).
template <class A, class T>
__global__ void __launch_bounds__(T::kThreads, T::kScanBlocks)
    forward_kernel(const __grid_constant__ ForwardParams<A> f) {
  const ScanArgs& a = f.a;
  char* const memory = dynamic_shared_memory();
  int* const slot = reinterpret_cast<int*>(memory);
  const int tile = f.p.channels * T::kPlane, gate = a.gate_channels ? tile : T::kPlane;
  A* const x = reinterpret_cast<A*>(memory + 16);
  const Pair<A> h{x + tile, tile}, g{x + 3 * tile, a.gate_directions ? gate : 0};
  const int axis = threadIdx.x / (T::kThreads / 2);

  for (;;) {
    const int64_t ticket = draw_ticket(f.flags, slot);
    if (ticket >= f.p.tasks) return;
    const Task t = f.p.task(ticket);
    load_input<T::kSide>(f.p, t, a, x);
    load_gates<T::kSide>(f.p, t, a, g);
    wait_upstream(f.p, t, f.flags, t.from_end);

    const int d = f.p.direction[t.pass][axis];
    const Path path = Path::of<T::kSide>(t, axis);
    Border<A> border{};
    if (d >= 0) border = Border<A>::of(f.p, t, f.borders.states[d], axis, t.from_end);
    T::scan(a, t, d, path, ScanTiles<A>{x, g[axis], a.gate_channels ? T::kPlane : 0, h[axis]},
            border);
    const Visit visit =
        finish_states(f.p, t, f.flags, a.y != nullptr && passes_meet(a, f.p), slot);
    if (a.y == nullptr) continue;
    if (a.merge == Merge::kNone)
      write_maps<A, T>(f, t, h);
    else
      write_merged<A, T>(f, t, visit, h);
    finish_visit(f.p, t, f.flags, visit);
  }
}

template <class A>
int64_t forward(const ScanArgs& a, void* memory, cudaStream_t stream) {
  Workspace workspace(memory);
  const auto planes = [&]<class T>() { return forward_planes<A, T>(a); };
  choose_steps<A, false>(a, planes, [&]<class T>() {
    ForwardParams<A> f{};
    f.a = a;
    f.p = plan_tiles(a, T::kSide, T::channels(a.block));
    f.flags = take_flags(workspace, f.p, stream);
    f.borders = take_borders<A>(workspace, a, f.p);
    const bool rounds = a.dtype == Dtype::kBFloat16 || a.dtype == Dtype::kFloat16;
    f.share = static_cast<A*>(a.y);
    if (rounds && passes_meet(a, f.p)) f.share = workspace.take<A>(a.n * a.c * a.h * a.w);
    if (!workspace.counts_only()) launch_forward<A, T>(f, stream);
  });
  return workspace.bytes();
}

}  // namespace

template <class A, class T>
void launch_forward(ForwardParams<A> f, cudaStream_t stream) {
  const auto kernel = forward_kernel<A, T>;
  const size_t shared = shared_bytes<T, A>(forward_planes<A, T>(f.a));
  const int blocks = resident_blocks(kernel, T::kThreads, shared, f.p.tasks);
  f.p.advance_together(blocks);
  launch(kernel, dim3(blocks), dim3(T::kThreads), shared, stream, f);
  check_launch("forward_kernel");
}

// For the backward pass.
#define GATEDRNN_INSTANTIATE(A, K, SIDE, R) \
  template void launch_forward<A, Steps<A, K, SIDE, R>>(ForwardParams<A>, cudaStream_t)
GATEDRNN_INSTANTIATE(float, 1, 16, 2);
GATEDRNN_INSTANTIATE(float, 2, 16, 2);
GATEDRNN_INSTANTIATE(float, 4, 16, 2);
GATEDRNN_INSTANTIATE(float, 8, 16, 2);
GATEDRNN_INSTANTIATE(float, 16, 8, 2);
GATEDRNN_INSTANTIATE(float, 0, 16, 0);
GATEDRNN_INSTANTIATE(float, 0, 4, 0);
GATEDRNN_INSTANTIATE(float, 0, 1, 0);
GATEDRNN_INSTANTIATE(double, 0, 16, 0);
GATEDRNN_INSTANTIATE(double, 0, 4, 0);
GATEDRNN_INSTANTIATE(double, 0, 1, 0);

int64_t forward(const ScanArgs& a, void* workspace, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  return a.dtype == Dtype::kFloat64 ? forward<double>(a, workspace, queue)
                                    : forward<float>(a, workspace, queue);
}

}  // namespace gatedrnn::cuda
