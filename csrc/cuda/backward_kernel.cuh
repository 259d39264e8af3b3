// The backward kernel. It visits tiles against their directions. At each tile it computes h again,
// from the carries that the wavefront kernel stored, and then runs the adjoint.
#pragma once

#include "cuda/gradients.cuh"
#include "cuda/tasks.cuh"

namespace gatedrnn::cuda {

// The tiles in shared memory. dL/dy is loaded into the place of dx. Once h is computed, dx of rows
// takes the place of x.
template <class A, class T>
struct BackwardTiles {
  A* x;
  PerAxis<A> dx, h, dg, g, e;
  GATEDRNN_DEVICE explicit BackwardTiles(const BackwardParams<A>& f) {
    const int tile = T::kPixels * f.p.channels;
    x = shared_at<A>(kTilesBegin);
    dx = {x, tile};
    h = {x + 2 * tile, tile};
    dg = e = h;
    A* rest = x + 4 * tile;
    if (!T::kInPlace) {
      dg = {rest, tile}, e = {rest + 2 * tile, tile};
      rest += 4 * tile;
    }
    g = {rest, f.a.gate_directions ? gate_size<T>(f.p, f.a) : 0};
    if (f.a.dg == nullptr) dg = {nullptr, 0};
  }
};

template <class A, class T>
GATEDRNN_DEVICE void load_gradients(const BackwardParams<A>& f) {
  load_gradient<A, T>(f, task_slot().task, BackwardTiles<A, T>(f).dx);
}

template <class A, class T>
GATEDRNN_DEVICE void prefetch_next_tiles(const BackwardParams<A>& f) {
  const BackwardArgs& a = f.a;
  if (next_slot().ticket >= f.p.tasks) return;
  const Task t = next_slot().task;
  prefetch_inputs<T>(f.p, t, a);
  if (a.merge != Merge::kNone)
    prefetch_map<T>(whole_block<T>(), f.p, t, a.dtype, a.grad, a.grad_strides, 0, true);
}

// Writes dx, then dg. If each direction has its own gates, dg is written for one axis at a time.
template <class A, class T>
GATEDRNN_DEVICE void write_gradients(const BackwardParams<A>& f) {
  const Task t = task_slot().task;
  const BackwardArgs& a = f.a;
  const BackwardTiles<A, T> tiles(f);
  const auto& directions = f.p.direction[t.pass];
#pragma unroll 1
  for (int i = 0; i < 1 + (a.dg ? (a.gate_directions ? kAxes : 1) : 0); ++i) {
    const bool is_gate = i > 0, apart = is_gate && a.gate_directions;
    const int only = apart ? i - 1 : 0;
    if (apart && directions[only] < 0) continue;
    const PerAxis<A> maps = is_gate ? tiles.dg : tiles.dx;
    A* const one = directions[only] >= 0 ? maps[only] : nullptr;
    A* const other = !apart && directions[1] >= 0 ? maps[1] : nullptr;
    const int64_t direction = apart ? directions[only] : 0;
    const bool summed = is_gate && !a.gate_channels;
    const Strides& s = is_gate ? a.dg_strides : a.dx_strides;
    int64_t corner = tile_corner(f.p, t, s, direction, summed ? 0 : t.c0);
    if (is_gate) {
      corner += f.p.channel_tile(t.unit) * f.gate_tile_size;
      differentiate_gate_activation<A, T>(f, t, direction, tiles.g[only], one, other);
      block_sync<T>();
    }
    write_gradient<A, T>(t, apart ? kOnly : t.visit, is_gate ? f.dg : f.dx, corner, s,
                         summed ? 1 : t.channels, summed ? t.channels : 1, one, other);
  }
}

// Computes h along the directions, from the carries of the wavefront kernel.
template <class A, class T>
GATEDRNN_DEVICE void scan_tiles(const BackwardParams<A>& f) {
  Task t = task_slot().task;
  const int axis = threadIdx.x / (T::kThreads / 2), d = f.p.direction[t.pass][axis];
  const BackwardTiles<A, T> tiles(f);
  t.from_end = !t.from_end;
  Border<A> border{};
  if (d >= 0) border = Border<A>::of(f.p, t, f.states.states[d], axis, t.from_end);
  border.out = nullptr;  // the carries exist already
  T::scan(f.a, t, d, LineWalk::of<T::kSide>(t, axis),
          ScanTiles<A>{tiles.x, tiles.g[axis], f.a.gate_channels ? T::kPixels : 0, tiles.h[axis]},
          border, [] {});
}

// Runs the adjoint. Sums for the weight stay in registers, and are added over a warp at the end.
template <class A, class T>
GATEDRNN_DEVICE void adjoint_tiles(const BackwardParams<A>& f) {
  const Task t = task_slot().task;
  const int axis = threadIdx.x / (T::kThreads / 2), d = f.p.direction[t.pass][axis];
  const BackwardTiles<A, T> tiles(f);
  Border<A> border{};
  if (d >= 0) border = Border<A>::of(f.p, t, f.adjoints.states[d], axis, t.from_end);
  A* sums = nullptr;
  if (f.weight_sums && d >= 0) {
    const int64_t group = d * f.p.channel_tiles + f.p.channel_tile(t.unit);
    const int64_t per_image = f.sums.slots / f.a.n;
    const int64_t place = T::kSumsInChains ? (axis == 0 ? t.cell.row : t.cell.column)
                                           : f.p.index(t.cell) * int64_t{T::kSumsPerTile};
    sums = f.weight_sums + (group * f.sums.slots + t.n * per_image + place) * f.sums.values;
  }
  Task along = t;  // along the directions
  along.from_end = !t.from_end;
  T::adjoint(f.a, t, d, LineWalk::of<T::kSide>(along, axis),
             AdjointTiles<A>{tiles.g[axis], f.a.gate_channels ? T::kPixels : 0, tiles.h[axis],
                             tiles.e[axis], tiles.dx[axis], tiles.dg[axis], sums},
             border, [&] { wait_upstream<T>(f.p, t, f.flags, t.from_end); });
}

template <class A, class T>
GATEDRNN_NOINLINE void adjoint_tiles_noinline(const BackwardParams<A>& f) {
  adjoint_tiles<A, T>(f);
}

// A block owns one tile at a time. Threads and tiles are those of the wavefront kernel. In
// addition, shared memory holds dx and dg for each axis. Sums accumulate in the state's type.
template <class A, class T>
__global__ void __launch_bounds__(T::kThreads, T::kAdjointBlocks)
    backward_kernel(const __grid_constant__ BackwardParams<A> f) {
  const auto decode = [&](int ticket, Task& t) { t = f.p.task(ticket); };
  Tasks<T, decltype(decode)> tasks(f.flags.ticket, f.p.tasks, decode);
  while (tasks.next()) {
    const Task& t = task_slot().task;
    load_tiles<T>(f.p, f.a, f.flags, BackwardTiles<A, T>(f));
    block_sync<T>();
    scan_tiles<A, T>(f);
    block_sync<T>();
    load_gradients<A, T>(f);
    tasks.look_ahead();
    block_sync<T>();
    prefetch_next_tiles<A, T>(f);
    if constexpr (T::kAdjointNoinline)
      adjoint_tiles_noinline<A, T>(f);
    else
      adjoint_tiles<A, T>(f);
    finish_states<T>(f.p, t, f.flags);
    wait_first_visit<T>(f.p, t, f.flags);
    write_gradients<A, T>(f);
    finish_visit<T>(f.p, t, f.flags);
  }
}

template <class T>
void launch_backward(BackwardParams<typename T::Value> f, cudaStream_t stream) {
  const auto kernel = backward_kernel<typename T::Value, T>;
  const size_t shared = backward_bytes<T>(f.a);
  const int blocks = resident_blocks(kernel, T::kThreads, shared, f.p.tasks);
  f.p.advance_together(blocks);
  launch(kernel, dim3(blocks), dim3(T::kThreads), shared, stream, f);
  check_launch("backward_kernel");
}

}  // namespace gatedrnn::cuda
