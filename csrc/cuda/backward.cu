// Backward pass: the wavefront kernel leaves the states at the tiles' borders; then every tile is
// visited against its directions, where h is computed once more and the adjoint runs against it.
#include "cuda/forward.h"
#include "cuda/sums.h"
#include "cuda/wavefront.h"

namespace gatedrnn::cuda {
namespace {

template <class A>
struct BackwardParams {
  BackwardArgs a;
  TilePlan p;  // from_end is that of the walk: against the directions
  Flags flags;
  Borders<A> states, adjoints;  // h and e at the tiles' borders
  A *dx_share, *dg_share;       // what the first pass leaves for the second, laid out as dx, dg
  A* weight_sums;               // null if neither dweight nor dbias is wanted
  WeightSums sums;
  bool add_gates;  // dg is summed over channel tiles afterwards, from dg_share
};

// Tiles in shared memory, in elements of A.
template <class A, class T>
struct Tiles {
  int tile, gate, total;
  GATEDRNN_INLINE explicit Tiles(const BackwardArgs& a)
      : tile(T::channels(a.block) * T::kPlane), gate(a.gate_channels ? tile : T::kPlane) {
    // x and dg of rows, h and dx of both axes; dg of columns; e of both axes; gates.
    total = 5 * tile + (a.dg ? tile : 0) + (T::kSeparateAdjoint ? 2 * tile : 0) +
            (a.gate_directions ? 2 * gate : gate);
  }
};

// Reads dL/dy as each direction's share of it.
template <class A, class T>
GATEDRNN_DEVICE void load_gradient(const BackwardParams<A>& f, const Task& t, const Pair<A>& xi) {
  const BackwardArgs& a = f.a;
  const auto& directions = f.p.direction[t.pass];
  if (a.merge == Merge::kNone) {
    for (int axis = 0; axis < kAxes; ++axis)
      if (directions[axis] >= 0)
        read_map<T::kSide, A>(Team::block(), f.p, t, a.dtype, a.grad, a.grad_strides,
                              directions[axis], true, [&](int cell, A v) { xi[axis][cell] = v; });
    return;
  }
  const A scale = a.merge == Merge::kMean ? A(1) / static_cast<A>(a.directions) : A(1);
  read_map<T::kSide, A>(Team::block(), f.p, t, a.dtype, a.grad, a.grad_strides, 0, true,
                        [&](int cell, A v) { xi[0][cell] = xi[1][cell] = v * scale; });
  if (a.merge != Merge::kMax) return;
  __syncthreads();
  read_tile<unsigned>(
      Team::block(), box_of<T::kSide>(t, t.channels, a.y_strides),
      a.mask + tile_corner(f.p, t, a.y_strides, 0, t.c0), [&](int cell, unsigned m) {
        const A share =
            xi[0][cell] / static_cast<A>((m & 1) + (m >> 1 & 1) + (m >> 2 & 1) + (m >> 3 & 1));
        for (int axis = 0; axis < kAxes; ++axis) {
          const int d = directions[axis];
          if (d >= 0) xi[axis][cell] = m >> d & 1 ? share : A(0);
        }
      });
}

// Writes a share, or the sum of both; `finish` makes of a sum what is stored.
template <class A, class S, class Finish>
GATEDRNN_DEVICE void add_share(Visit visit, A value, A* share, S* result, const Finish& finish) {
  if (visit == kFirst) {
    *share = value;
    return;
  }
  if (visit == kSecond) value += load_shared_by_blocks(share);
  *result = to_storage<S>(finish(value));
}

template <class A, class T>
GATEDRNN_DEVICE void write_input_gradient(const BackwardParams<A>& f, const Task& t, Visit visit,
                                          const Pair<A>& dx) {
  const BackwardArgs& a = f.a;
  const auto& directions = f.p.direction[t.pass];
  const int64_t corner = tile_corner(f.p, t, a.dx_strides, 0, t.c0);
  with_storage<A>(a.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    for_each_element(
        Team::block(), box_of<T::kSide>(t, t.channels, a.dx_strides), [&](int64_t at, int cell) {
          const A value =
              (directions[0] >= 0 ? dx[0][cell] : A(0)) + (directions[1] >= 0 ? dx[1][cell] : A(0));
          add_share(visit, value, f.dx_share + corner + at, static_cast<S*>(a.dx) + corner + at,
                    [](A v) { return v; });
        });
  });
}

// dg of one map of gates: of both axes' directions where they share it, else of one.
template <class A, class T>
GATEDRNN_DEVICE void write_gate_gradient(const BackwardParams<A>& f, const Task& t, Visit visit,
                                         int64_t d, const A* one, const A* other) {
  const BackwardArgs& a = f.a;
  const int64_t first = a.gate_channels ? t.c0 : 0;
  const int64_t corner = tile_corner(f.p, t, a.dg_strides, d, first);
  const int summed = a.gate_channels ? 1 : t.channels;
  const Box box = box_of<T::kSide>(t, a.gate_channels ? t.channels : 1, a.dg_strides);
  const auto value_at = [&](int cell) {
    A value = 0;
    for (int c = 0; c < summed; ++c) {
      if (one) value += one[c * T::kPlane + cell];
      if (other) value += other[c * T::kPlane + cell];
    }
    return value;
  };
  if (f.add_gates) {
    const int64_t maps = a.n * (a.gate_directions ? a.directions : 1) * a.h * a.w;
    A* const share = f.dg_share + t.unit % f.p.channel_tiles * maps + corner;
    for_each_element(Team::block(), box, [&](int64_t at, int cell) {
      add_share(visit, value_at(cell), share + at, share + at, [](A v) { return v; });
    });
    return;
  }
  const Strides& s = a.g_strides;
  with_storage<A>(a.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const S* const g = static_cast<const S*>(a.g) + tile_corner(f.p, t, s, d, first);
    for_each_element(Team::block(), box, [&](int64_t at, int cell) {
      // The gate as given, for its norm's derivative: the tile holds it under the norm.
      const int plane = cell / T::kPlane, place = cell % T::kPlane;
      const int row = place / tile_stride(T::kSide), column = place % tile_stride(T::kSide);
      add_share(visit, value_at(cell), f.dg_share + corner + at,
                static_cast<S*>(a.dg) + corner + at, [&](A v) {
                  if (a.gate_norm == GateNorm::kNone) return v;
                  const A raw = to_state<A>(g[plane * s.c + row * s.h + column * s.w]);
                  return gate_norm_backward(a.gate_norm, raw, v);
                });
    });
  });
}

// A block owns a tile at a time, as in the wavefront kernel, whose threads and tiles these are;
// beside them tiles of dx and dg for each axis. dL/dy stands where dx will, and x gives its place
// to dg of rows once h is there. Weights' sums are kept in registers and added up over a warp
// (steps.h).
template <class A, class T>
__global__ void __launch_bounds__(T::kThreads, T::kAdjointBlocks)
    backward_kernel(const __grid_constant__ BackwardParams<A> f) {
  const BackwardArgs& a = f.a;
  char* const memory = dynamic_shared_memory();
  int* const slot = reinterpret_cast<int*>(memory);
  const Tiles<A, T> sizes(a);
  const int tile = sizes.tile, gate_plane = a.gate_channels ? T::kPlane : 0;
  A* const x = reinterpret_cast<A*>(memory + 16);
  const Pair<A> dg{a.dg ? x : nullptr, a.dg ? tile : 0};
  A* const rest = x + (a.dg ? 2 : 1) * tile;
  const Pair<A> h{rest, tile}, dx{rest + 2 * tile, tile};
  const Pair<A> g{rest + 4 * tile, a.gate_directions ? sizes.gate : 0};
  const Pair<A> e{g[1] + sizes.gate, T::kSeparateAdjoint ? tile : 0};
  const int axis = threadIdx.x / (T::kThreads / 2);

  for (;;) {
    const int ticket = draw_ticket(f.flags, slot);
    if (ticket >= f.p.tasks) return;
    const Task t = f.p.task(ticket);
    Task along = t;  // the way of the directions
    along.from_end = !t.from_end;
    const auto& directions = f.p.direction[t.pass];
    load_input<T::kSide>(Team::block(), f.p, t, a, x);
    load_gates<T::kSide>(f.p, t, a, g);
    load_gradient<A, T>(f, t, dx);
    __syncthreads();

    const int d = directions[axis];
    const Path path = Path::of<T::kSide>(along, axis);
    Border<A> state{}, adjoint{};
    if (d >= 0) {
      state = Border<A>::of(f.p, t, f.states.states[d], axis, along.from_end);
      state.out = nullptr;  // they are there
      adjoint = Border<A>::of(f.p, t, f.adjoints.states[d], axis, t.from_end);
    }
    T::scan(a, t, d, path, ScanTiles<A>{x, g[axis], gate_plane, h[axis]}, state);
    wait_upstream(f.p, t, f.flags, t.from_end);
    A* sums = nullptr;
    if (f.weight_sums && d >= 0) {
      const int64_t group = d * f.p.channel_tiles + t.unit % f.p.channel_tiles;
      const int64_t per_image = f.sums.slots / a.n;
      const int64_t place = T::kSumsInChains ? (axis == 0 ? t.cell.row : t.cell.column)
                                             : f.p.index(t.cell) * int64_t{T::kSumsPerTile};
      sums = f.weight_sums + (group * f.sums.slots + t.n * per_image + place) * f.sums.values;
    }
    T::adjoint(a, t, d, path,
               AdjointTiles<A>{g[axis], gate_plane, h[axis], e[axis], dx[axis], dg[axis], sums},
               adjoint);

    const Visit visit = finish_states(f.p, t, f.flags, f.p.passes == 2, slot);
    write_input_gradient<A, T>(f, t, visit, dx);
    if (a.dg && a.gate_directions) {
      for (int i = 0; i < kAxes; ++i)
        if (directions[i] >= 0)
          write_gate_gradient<A, T>(f, t, kOnly, directions[i], dg[i], nullptr);
    } else if (a.dg) {
      write_gate_gradient<A, T>(f, t, visit, 0, directions[0] >= 0 ? dg[0] : nullptr,
                                directions[1] >= 0 ? dg[1] : nullptr);
    }
    finish_visit(f.p, t, f.flags, visit);
  }
}

template <class A>
int64_t backward(const BackwardArgs& a, void* memory, cudaStream_t stream) {
  Workspace workspace(memory);
  const auto planes = [&]<class T>() -> int64_t {
    return ceil_div(Tiles<A, T>(a).total, T::kPlane);
  };
  choose_steps<A, true>(a, planes, [&]<class T>() {
    WavefrontParams<A> h{};
    h.a = a;
    h.a.y = nullptr, h.a.mask = nullptr;
    h.p = plan_tiles(a, T::kSide, T::channels(a.block));
    h.flags = take_flags(workspace, h.p, stream);
    h.borders = take_borders<A>(workspace, a, h.p);

    BackwardParams<A> f{};
    f.a = a;
    f.p = h.p;
    for (bool& from_end : f.p.from_end) from_end = !from_end;
    f.flags = take_flags(workspace, f.p, stream);
    f.states = h.borders;
    f.adjoints = take_borders<A>(workspace, a, f.p);
    const bool rounds = a.dtype == Dtype::kBFloat16 || a.dtype == Dtype::kFloat16;
    const bool meet = f.p.passes == 2;
    f.dx_share = static_cast<A*>(a.dx), f.dg_share = static_cast<A*>(a.dg);
    if (rounds && meet) f.dx_share = workspace.take<A>(a.n * a.c * a.h * a.w);
    const int64_t gates =
        a.n * (a.gate_directions ? a.directions : 1) * (a.gate_channels ? a.c : 1) * a.h * a.w;
    f.add_gates = a.dg && !a.gate_channels && f.p.channel_tiles > 1;
    if (f.add_gates)
      f.dg_share = workspace.take<A>(gates * f.p.channel_tiles);
    else if (a.dg && rounds && meet && !a.gate_directions)
      f.dg_share = workspace.take<A>(gates);
    const int64_t per_image = T::kSumsInChains ? std::max(f.p.tile_rows, f.p.tile_columns)
                                               : f.p.tiles() * int64_t{T::kSumsPerTile};
    f.sums = {a.directions * f.p.channel_tiles, a.n * per_image, f.p.channels * (a.block + 1),
              f.p.channels, a.block};
    double* totals = nullptr;
    if (a.dweight || a.dbias) {
      f.weight_sums = workspace.take<A>(f.sums.count());
      totals = workspace.take<double>(f.sums.groups * f.sums.chunks() * f.sums.values);
    }
    if (workspace.counts_only()) return;

    if (totals && T::kSumsInChains)  // an axis may have fewer chains than the other
      check(cudaMemsetAsync(f.weight_sums, 0, f.sums.count() * sizeof(A), stream),
            "cudaMemsetAsync");
    launch_wavefront<T>(h, stream);
    const auto kernel = backward_kernel<A, T>;
    const size_t shared = shared_bytes<T>(planes.template operator()<T>());
    const int blocks = resident_blocks(kernel, T::kThreads, shared, f.p.tasks);
    f.p.advance_together(blocks);
    launch(kernel, dim3(blocks), dim3(T::kThreads), shared, stream, f);
    check_launch("backward_kernel");
    if (totals) add_weight_sums<A>(a, f.sums, f.weight_sums, totals, stream);
    if (f.add_gates) add_gate_sums<A>(a, f.p.channel_tiles, f.dg_share, stream);
  });
  return workspace.bytes();
}

}  // namespace

int64_t backward(const BackwardArgs& a, void* workspace, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  return a.dtype == Dtype::kFloat64 ? backward<double>(a, workspace, queue)
                                    : backward<float>(a, workspace, queue);
}

}  // namespace gatedrnn::cuda
