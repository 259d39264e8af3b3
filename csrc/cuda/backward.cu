// Backward pass: the wavefront kernel leaves the states at the tiles' borders; then every tile is
// visited against its directions, where h is computed once more and the adjoint runs against it.
#include "cuda/forward.h"
#include "cuda/merge.h"
#include "cuda/sums.h"
#include "cuda/wavefront.h"

namespace gatedrnn::cuda {
namespace {

// A map of gradients: where it is, and where the first pass leaves its share for the second.
template <class A>
struct GradientMap {
  void* result;
  A* share;
  Dtype dtype;
};

template <class A>
struct BackwardParams {
  BackwardArgs a;
  TilePlan p;  // from_end is that of the walk: against the directions
  Flags flags;
  Borders<A> states, adjoints;  // h and e at the tiles' borders
  GradientMap<A> dx, dg;
  int64_t gate_tile_size;  // of dg, where each channel tile has its own, to be summed afterwards
  A* weight_sums;          // null if neither dweight nor dbias is wanted
  WeightSums sums;
};

// What each of those directions gets that attain a maximum: one, a half, a third or a fourth.
template <class A>
GATEDRNN_DEVICE A even_share(unsigned winners) {
  const int count = __popc(winners);
  return count == 1 ? A(1) : count == 2 ? A(0.5) : count == 3 ? A(1) / A(3) : A(0.25);
}

// Reads dL/dy as each direction's share of it.
template <class A, class T>
GATEDRNN_DEVICE void load_gradient(const BackwardParams<A>& f, const Task& t, const Pair<A>& xi) {
  const BackwardArgs& a = f.a;
  const auto& directions = f.p.direction[t.pass];
  const auto team = whole_block<T>();
  if (a.merge == Merge::kNone) {
#pragma unroll 1
    for (int axis = 0; axis < kAxes; ++axis)
      if (const int d = directions[axis]; d >= 0)
        read_map<T>(team, f.p, t, a.dtype, a.grad, a.grad_strides, d, true, GateNorm::kNone,
                    xi[axis]);
    return;
  }
  const bool is_max = a.merge == Merge::kMax;
  const int rows = directions[0], columns = directions[1];
  const A scale = merge_scale<A>(a);
  const uint8_t* const mask = a.mask + tile_corner(f.p, t, a.y_strides, 0, t.c0);
  const auto winners_at = [&]<int W>(int64_t at) {
    return is_max ? pack_at<W>(mask + at) : Pack<uint8_t, W>{};
  };
  // Bytes of a pack side by side in a word: a mask's, or each of them 1.
  constexpr unsigned ones = 0x01010101;
  const unsigned any_row = rows >= 0 ? ones : 0, any_column = columns >= 0 ? ones : 0;
  const auto share_out = [&]<int W>(int cell, int next, const Pack<A, W>& grad,
                                    const Pack<uint8_t, W>& winners) {
    unsigned word = 0, ties = 0, row_wins = any_row, column_wins = any_column;
    if (is_max) {
      memcpy(&word, &winners, W);
      ties = word & (word - (W == 1 ? 1 : ones));  // a byte with several bits, or none
      row_wins &= word >> (rows & 3);
      column_wins &= word >> (columns & 3);
    }
    Pack<A, W> share, of_rows, of_columns;
#pragma unroll
    for (int k = 0; k < W; ++k) share.values[k] = grad.values[k] * scale;
    if (ties)
#pragma unroll
      for (int k = 0; k < W; ++k) share.values[k] *= even_share<A>(winners.values[k]);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      of_rows.values[k] = row_wins & 1u << 8 * k ? share.values[k] : A(0);
      of_columns.values[k] = column_wins & 1u << 8 * k ? share.values[k] : A(0);
    }
    store_cells(xi[0], cell, next, of_rows);
    store_cells(xi[1], cell, next, of_columns);
  };
  // Together with the mask, where they lie alike.
  bool done = false;
  with_storage<A>(a.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const S* const grad =
        static_cast<const S*>(a.grad) + tile_corner(f.p, t, a.grad_strides, 0, t.c0);
    if (!lie_alike(a.grad_strides, a.y_strides) || is_aligned(grad) != is_aligned(mask)) return;
    done = true;
    with_walk<T, T::kPacks>(
        team, t, t.channels, a.grad_strides, grad, [&]<int W>(int next, const auto& walk) {
          struct Both {
            Pack<S, W> grad;
            Pack<uint8_t, W> winners;
          };
          walk(
              [&](int64_t at) {
                return Both{pack_at<W>(grad + at), winners_at.template operator()<W>(at)};
              },
              [&](int64_t, int cell, const Both& both) {
                Pack<A, W> values;
#pragma unroll
                for (int k = 0; k < W; ++k) values.values[k] = to_state<A>(both.grad.values[k]);
                share_out.template operator()<W>(cell, next, values, both.winners);
              });
        });
  });
  if (done) return;
  read_map<T>(team, f.p, t, a.dtype, a.grad, a.grad_strides, 0, true, GateNorm::kNone, xi[0]);
  meet<T>();
  with_walk<T, T::kPacks>(team, t, t.channels, a.y_strides, mask,
                          [&]<int W>(int next, const auto& walk) {
                            walk([&](int64_t at) { return winners_at.template operator()<W>(at); },
                                 [&](int64_t, int cell, const Pack<uint8_t, W>& winners) {
                                   share_out.template operator()<W>(
                                       cell, next, load_cells<W>(xi[0], cell, next), winners);
                                 });
                          });
}

// Makes of dL/d(gate under its norm), in the tiles of one map of gates, dL/dg.
template <class A, class T>
GATEDRNN_DEVICE void differentiate_gate_norm(const BackwardParams<A>& f, const Task& t, int64_t d,
                                             const A* gates, A* one, A* other) {
  const BackwardArgs& a = f.a;
  if (a.gate_norm == GateNorm::kNone) return;
  const auto team = whole_block<T>();
  const int gates_of_pixel = a.gate_channels ? t.channels : 1;
  const int served = a.gate_channels ? 1 : t.channels;  // channels that a gate serves
  const auto scale = [&](int cell, auto factor) {
#pragma unroll 1
    for (int c = 0; c < served; ++c) {
      const int at = served > 1 ? T::other_channel(cell, c) : cell;
      if (one) one[at] = factor(one[at]);
      if (other) other[at] = factor(other[at]);
    }
  };
  if (a.gate_norm != GateNorm::kClamp) {
    with_walk<T, T::kPacks>(
        team, t, gates_of_pixel, a.g_strides, gates, [&]<int W>(int next, const auto& walk) {
          walk(NoLoad(), [&](int64_t, int cell, bool) {
#pragma unroll 1
            for (int k = 0; k < W; ++k, cell += next) {
              const A gate = gates[cell];
              const A slope = a.gate_norm == GateNorm::kTanh ? 1 - gate * gate : gate * (1 - gate);
              scale(cell, [slope](A v) { return v * slope; });
            }
          });
        });
    return;
  }
  // Of a gate at +-1 the tile does not tell whether it was cut.
  const int64_t corner = tile_corner(f.p, t, a.g_strides, d, a.gate_channels ? t.c0 : 0);
  with_storage<A>(a.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const S* const from = static_cast<const S*>(a.g) + corner;
    with_walk<T, T::kPacks>(team, t, gates_of_pixel, a.g_strides, from,
                            [&]<int W>(int next, const auto& walk) {
                              walk([&](int64_t at) { return pack_at<W>(from + at); },
                                   [&](int64_t, int cell, const Pack<S, W>& given) {
                                     bool cut[W];
#pragma unroll
                                     for (int k = 0; k < W; ++k) {
                                       const A gate = to_state<A>(given.values[k]);
                                       cut[k] = !((gate <= 1) & (gate >= -1));  // NaN too
                                     }
                                     if (served > 1) {
                                       if (cut[0]) scale(cell, [](A) { return A(0); });
                                       return;
                                     }
                                     const auto clear = [&](A* tile) {
                                       Pack<A, W> left = load_cells<W>(tile, cell, next);
#pragma unroll
                                       for (int k = 0; k < W; ++k)
                                         left.values[k] = cut[k] ? A(0) : left.values[k];
                                       store_cells(tile, cell, next, left);
                                     };
                                     if (one) clear(one);
                                     if (other) clear(other);
                                   });
                            });
  });
}

// Writes a tile's share of a gradient, or the sum of both passes' shares. `one` and `other` are the
// axes' parts of it, null for none; `summed` channels of them make one of a map of `channels`.
template <class A, class T>
GATEDRNN_DEVICE void write_gradient(const Task& t, Visit visit, const GradientMap<A>& map,
                                    int64_t corner, const Strides& s, int channels, int summed,
                                    const A* one, const A* other) {
  A* const share = map.share + corner;
  // To the share for a first visit, else to the result.
  const auto write = [&]<class S>(S* result) {
    with_walk<T, T::kPacks>(
        whole_block<T>(), t, channels, s, result, [&]<int W>(int next, const auto& walk) {
          walk(
              [&](int64_t at) {
                return visit == kSecond ? load_shared_by_blocks(&pack_at<W>(share + at))
                                        : Pack<A, W>{};
              },
              [&](int64_t at, int cell, const Pack<A, W>& before) {
                Pack<A, W> sum{};
                const auto add = [&](const Pack<A, W>& more) {
#pragma unroll
                  for (int k = 0; k < W; ++k) sum.values[k] += more.values[k];
                };
                if (summed == 1) {
                  if (one) sum = load_cells<W>(one, cell, next);
                  if (other) add(load_cells<W>(other, cell, next));
                }
                if constexpr (W == 1)
                  for (int c = 0; summed > 1 && c < summed; ++c) {
                    if (one) add(load_cells<W>(one, T::other_channel(cell, c), next));
                    if (other) add(load_cells<W>(other, T::other_channel(cell, c), next));
                  }
                if (visit == kSecond) add(before);
                Pack<S, W> values;
#pragma unroll
                for (int k = 0; k < W; ++k) values.values[k] = to_storage<S>(sum.values[k]);
                pack_at<W>(result + at) = values;
              });
        });
  };
  if (visit == kFirst)
    write(share);
  else
    with_storage<A>(map.dtype, [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      write(static_cast<S*>(map.result) + corner);
    });
}

// Where the tiles are in shared memory. x gives its place to dx of rows once h is there; dL/dy
// stands where dx will.
template <class A, class T>
struct BackwardTiles {
  A* x;
  Pair<A> dx, h, dg, g, e;
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
  static size_t bytes(const ScanArgs& a) { return shared_bytes<T>(a, T::kInPlace ? 4 : 8); }
};

template <class A, class T>
GATEDRNN_DEVICE void load_tiles(const BackwardParams<A>& f) {
  const Task t = task_slot().task;
  const BackwardTiles<A, T> tiles(f);
  const Ticket<T> ticket(f.flags.ticket);
  load_inputs<T>(whole_block<T>(), f.p, t, f.a, f.p.direction[t.pass], tiles.x, tiles.g);
  ticket.keep();
}
template <class A, class T>
GATEDRNN_DEVICE void load_gradients(const BackwardParams<A>& f) {
  load_gradient<A, T>(f, task_slot().task, BackwardTiles<A, T>(f).dx);
}

template <class A, class T>
GATEDRNN_DEVICE void ask_for_next_tiles(const BackwardParams<A>& f) {
  const BackwardArgs& a = f.a;
  if (next_slot().ticket >= f.p.tasks) return;
  const Task t = next_slot().task;
  ask_for_inputs<T>(f.p, t, a);
  if (a.merge != Merge::kNone)
    ask_for_map<T>(whole_block<T>(), f.p, t, a.dtype, a.grad, a.grad_strides, 0, true);
}

// dx, then dg: of both axes' directions where they share their gates, else of one at a time.
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
    const Pair<A> maps = is_gate ? tiles.dg : tiles.dx;
    A* const one = directions[only] >= 0 ? maps[only] : nullptr;
    A* const other = !apart && directions[1] >= 0 ? maps[1] : nullptr;
    const int64_t direction = apart ? directions[only] : 0;
    const bool summed = is_gate && !a.gate_channels;
    const Strides& s = is_gate ? a.dg_strides : a.dx_strides;
    int64_t corner = tile_corner(f.p, t, s, direction, summed ? 0 : t.c0);
    if (is_gate) {
      corner += f.p.channel_tile(t.unit) * f.gate_tile_size;
      differentiate_gate_norm<A, T>(f, t, direction, tiles.g[only], one, other);
      meet<T>();
    }
    write_gradient<A, T>(t, apart ? kOnly : t.visit, is_gate ? f.dg : f.dx, corner, s,
                         summed ? 1 : t.channels, summed ? t.channels : 1, one, other);
  }
}

// h, along the directions, from the states that the wavefront has left.
template <class A, class T>
GATEDRNN_DEVICE void scan_tiles(const BackwardParams<A>& f) {
  Task t = task_slot().task;
  const int axis = threadIdx.x / (T::kThreads / 2), d = f.p.direction[t.pass][axis];
  const BackwardTiles<A, T> tiles(f);
  t.from_end = !t.from_end;
  Border<A> border{};
  if (d >= 0) border = Border<A>::of(f.p, t, f.states.states[d], axis, t.from_end);
  border.out = nullptr;  // they are there
  T::scan(f.a, t, d, Path::of<T::kSide>(t, axis),
          ScanTiles<A>{tiles.x, tiles.g[axis], f.a.gate_channels ? T::kPixels : 0, tiles.h[axis]},
          border, [] {});
}

// Weights' sums are kept in registers and added up over a warp (steps.h).
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
  Task along = t;  // the way of the directions
  along.from_end = !t.from_end;
  T::adjoint(f.a, t, d, Path::of<T::kSide>(along, axis),
             AdjointTiles<A>{tiles.g[axis], f.a.gate_channels ? T::kPixels : 0, tiles.h[axis],
                             tiles.e[axis], tiles.dx[axis], tiles.dg[axis], sums},
             border, [&] { wait_upstream<T>(f.p, t, f.flags, t.from_end); });
}

template <class A, class T>
GATEDRNN_APART void adjoint_tiles_apart(const BackwardParams<A>& f) {
  adjoint_tiles<A, T>(f);
}

// A block owns a tile at a time, as in the wavefront kernel, whose threads and tiles these are;
// beside them tiles of dx and dg for each axis.
template <class A, class T>
__global__ void __launch_bounds__(T::kThreads, T::kAdjointBlocks)
    backward_kernel(const __grid_constant__ BackwardParams<A> f) {
  const auto decode = [&](int ticket, Task& t) { t = f.p.task(ticket); };
  Tasks<T, decltype(decode)> tasks(f.flags.ticket, f.p.tasks, decode);
  while (tasks.next()) {
    const Task& t = task_slot().task;
    load_tiles<A, T>(f);
    meet<T>();
    scan_tiles<A, T>(f);
    meet<T>();
    load_gradients<A, T>(f);
    tasks.look_ahead();
    meet<T>();
    ask_for_next_tiles<A, T>(f);
    if constexpr (T::kAdjointApart)
      adjoint_tiles_apart<A, T>(f);
    else
      adjoint_tiles<A, T>(f);
    finish_states<T>(f.p, t, f.flags);
    wait_first_visit<T>(f.p, t, f.flags);
    write_gradients<A, T>(f);
    finish_visit<T>(f.p, t, f.flags);
  }
}

template <class A>
int64_t backward(const BackwardArgs& a, void* memory, cudaStream_t stream) {
  Workspace workspace(memory);
  const auto bytes = [&]<class T>() { return BackwardTiles<A, T>::bytes(a); };
  choose_steps<A>(a, bytes, [&]<class T>() {
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
    f.dx = {a.dx, static_cast<A*>(a.dx), a.dtype};
    f.dg = {a.dg, static_cast<A*>(a.dg), a.dtype};
    if (rounds && meet) f.dx.share = workspace.take<A>(a.n * a.c * a.h * a.w);
    const int64_t gates =
        a.n * (a.gate_directions ? a.directions : 1) * (a.gate_channels ? a.c : 1) * a.h * a.w;
    // A gate that serves several channel tiles: each has a map of its own, summed afterwards.
    const bool add_gates = a.dg && !a.gate_channels && f.p.channel_tiles > 1;
    if (add_gates) {
      f.gate_tile_size = gates;
      f.dg.share = workspace.take<A>(gates * f.p.channel_tiles);
      f.dg.result = f.dg.share;
      f.dg.dtype = std::is_same_v<A, double> ? Dtype::kFloat64 : Dtype::kFloat32;
    } else if (a.dg && rounds && meet && !a.gate_directions) {
      f.dg.share = workspace.take<A>(gates);
    }
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
    const size_t shared = bytes.template operator()<T>();
    const int blocks = resident_blocks(kernel, T::kThreads, shared, f.p.tasks);
    f.p.advance_together(blocks);
    launch(kernel, dim3(blocks), dim3(T::kThreads), shared, stream, f);
    check_launch("backward_kernel");
    if (totals) add_weight_sums<A>(a, f.sums, f.weight_sums, totals, stream);
    if (add_gates) add_gate_sums<A>(a, f.p.channel_tiles, f.dg.share, stream);
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
