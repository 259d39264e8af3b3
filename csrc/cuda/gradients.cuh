// Tiles of gradients: loads dL/dy, and stores dx and dg.
#pragma once

#include "cuda/backward.cuh"
#include "cuda/merge.cuh"

namespace gatedrnn::cuda {

// The share of each direction that attains a maximum: 1, 1/2, 1/3 or 1/4.
template <class A>
GATEDRNN_DEVICE A even_share(unsigned argmax) {
  const int count = __popc(argmax);
  return count == 1 ? A(1) : count == 2 ? A(0.5) : count == 3 ? A(1) / A(3) : A(0.25);
}

// Loads dL/dy, and splits it into the share of each direction.
template <class A, class T>
GATEDRNN_DEVICE void load_gradient(const BackwardParams<A>& f, const Task& t,
                                   const PerAxis<A>& xi) {
  const BackwardArgs& a = f.a;
  const auto& directions = f.p.direction[t.pass];
  const auto threads = whole_block<T>();
  if (a.merge == Merge::kNone) {
#pragma unroll 1
    for (int axis = 0; axis < kAxes; ++axis)
      if (const int d = directions[axis]; d >= 0)
        read_map<T>(threads, f.p, t, a.dtype, a.grad, a.grad_strides, d, true,
                    GateActivation::kNone, xi[axis]);
    return;
  }
  const bool is_max = is_maximum(a.merge);
  const int rows = directions[0], columns = directions[1];
  const A scale = merge_scale<A>(a);
  const uint8_t* const mask = is_max ? a.mask + tile_corner(f.p, t, a.y_strides, 0, t.c0) : nullptr;
  const auto argmax_at = [&]<int W>(int64_t at) {
    return is_max ? pack_at<W>(mask + at) : Pack<uint8_t, W>{};
  };
  // The bytes of a pack in one word. A byte is 1 where the axis has a direction.
  constexpr unsigned ones = 0x01010101;
  const unsigned any_row = rows >= 0 ? ones : 0, any_column = columns >= 0 ? ones : 0;
  const auto share_out = [&]<int W>(int cell, int next, const Pack<A, W>& grad,
                                    const Pack<uint8_t, W>& argmax) {
    unsigned word = 0, ties = 0, row_wins = any_row, column_wins = any_column;
    if (is_max) {
      memcpy(&word, &argmax, W);
      ties = word & (word - (W == 1 ? 1 : ones));  // a byte with several bits, or none
      row_wins &= word >> (rows & 3);
      column_wins &= word >> (columns & 3);
    }
    Pack<A, W> share, of_rows, of_columns;
#pragma unroll
    for (int k = 0; k < W; ++k) share.values[k] = grad.values[k] * scale;
    if (ties)
#pragma unroll
      for (int k = 0; k < W; ++k) share.values[k] *= even_share<A>(argmax.values[k]);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      of_rows.values[k] = row_wins & 1u << 8 * k ? share.values[k] : A(0);
      of_columns.values[k] = column_wins & 1u << 8 * k ? share.values[k] : A(0);
    }
    store_cells(xi[0], cell, next, of_rows);
    store_cells(xi[1], cell, next, of_columns);
  };
  // dL/dy and the mask are loaded together if they have the same layout.
  bool done = false;
  dispatch_storage<A>(a.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const S* const grad =
        static_cast<const S*>(a.grad) + tile_corner(f.p, t, a.grad_strides, 0, t.c0);
    if (is_max &&
        !(same_layout(a.grad_strides, a.y_strides) && is_aligned(grad) == is_aligned(mask)))
      return;
    done = true;
    dispatch_layout<T>(
        threads, t, t.channels, a.grad_strides, grad, [&]<int W>(int next, const auto& for_each) {
          struct Both {
            Pack<S, W> grad;
            Pack<uint8_t, W> argmax;
          };
          for_each(
              [&](int64_t at) {
                return Both{pack_at<W>(grad + at), argmax_at.template operator()<W>(at)};
              },
              [&](int64_t, int cell, const Both& both) {
                Pack<A, W> values;
#pragma unroll
                for (int k = 0; k < W; ++k) values.values[k] = to_state<A>(both.grad.values[k]);
                share_out.template operator()<W>(cell, next, values, both.argmax);
              });
        });
  });
  if (done) return;
  read_map<T>(threads, f.p, t, a.dtype, a.grad, a.grad_strides, 0, true, GateActivation::kNone,
              xi[0]);
  block_sync<T>();
  dispatch_layout<T>(threads, t, t.channels, a.y_strides, mask,
                     [&]<int W>(int next, const auto& for_each) {
                       for_each([&](int64_t at) { return argmax_at.template operator()<W>(at); },
                                [&](int64_t, int cell, const Pack<uint8_t, W>& argmax) {
                                  share_out.template operator()<W>(
                                      cell, next, load_cells<W>(xi[0], cell, next), argmax);
                                });
                     });
}

// Turns dL/d(activated gate) into dL/dg, in the tiles of one map of gates.
template <class A, class T>
GATEDRNN_DEVICE void differentiate_gate_activation(const BackwardParams<A>& f, const Task& t,
                                                   int64_t d, const A* gates, A* of_row,
                                                   A* of_column) {
  const BackwardArgs& a = f.a;
  if (a.gate_activation == GateActivation::kNone) return;
  const auto threads = whole_block<T>();
  const int gates_of_pixel = a.gate_channels ? t.channels : 1;
  const int served = a.gate_channels ? 1 : t.channels;  // channels that one gate serves
  const auto scale = [&](int cell, auto factor) {
#pragma unroll 1
    for (int c = 0; c < served; ++c) {
      const int at = served > 1 ? T::other_channel(cell, c) : cell;
      if (of_row) of_row[at] = factor(of_row[at]);
      if (of_column) of_column[at] = factor(of_column[at]);
    }
  };
  if (is_smooth(a.gate_activation)) {
    dispatch_layout<T>(threads, t, gates_of_pixel, a.g_strides, gates,
                       [&]<int W>(int next, const auto& for_each) {
                         for_each(NoOp(), [&](int64_t, int cell, bool) {
#pragma unroll 1
                           for (int k = 0; k < W; ++k, cell += next) {
                             const A gate = gates[cell];
                             const A slope = smooth_derivative(a.gate_activation, gate);
                             scale(cell, [slope](A v) { return v * slope; });
                           }
                         });
                       });
    return;
  }
  // A clamped gate of +-1 does not tell whether it was cut. So the original gate is loaded.
  const int64_t corner = tile_corner(f.p, t, a.g_strides, d, a.gate_channels ? t.c0 : 0);
  dispatch_storage<A>(a.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const S* const from = static_cast<const S*>(a.g) + corner;
    dispatch_layout<T>(threads, t, gates_of_pixel, a.g_strides, from,
                       [&]<int W>(int next, const auto& for_each) {
                         for_each([&](int64_t at) { return pack_at<W>(from + at); },
                                  [&](int64_t, int cell, const Pack<S, W>& given) {
                                    bool cut[W];
#pragma unroll
                                    for (int k = 0; k < W; ++k) {
                                      const A gate = to_state<A>(given.values[k]);
                                      cut[k] = !((gate <= 1) & (gate >= -1));  // also for NaN
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
                                    if (of_row) clear(of_row);
                                    if (of_column) clear(of_column);
                                  });
                       });
  });
}

// Writes a tile's share of a gradient, or the sum of both passes' shares. `of_row` and `of_column`
// are the parts of the two axes, null for none. With `summed` > 1, that many channels are added to
// one.
template <class A, class T>
GATEDRNN_DEVICE void write_gradient(const Task& t, Visit visit, const GradientMap<A>& map,
                                    int64_t corner, const Strides& s, int channels, int summed,
                                    const A* of_row, const A* of_column) {
  A* const share = map.share + corner;
  // A first visit writes to the share, other visits to the result.
  const auto write = [&]<class S>(S* result) {
    dispatch_layout<T>(
        whole_block<T>(), t, channels, s, result, [&]<int W>(int next, const auto& for_each) {
          for_each(
              [&](int64_t at) {
                return visit == kSecond ? load_bypass_l1(&pack_at<W>(share + at)) : Pack<A, W>{};
              },
              [&](int64_t at, int cell, const Pack<A, W>& before) {
                Pack<A, W> sum{};
                const auto add = [&](const Pack<A, W>& more) {
#pragma unroll
                  for (int k = 0; k < W; ++k) sum.values[k] += more.values[k];
                };
                if (summed == 1) {
                  if (of_row) sum = load_cells<W>(of_row, cell, next);
                  if (of_column) add(load_cells<W>(of_column, cell, next));
                }
                if constexpr (W == 1) {
#pragma unroll 1
                  for (int c = 0; summed > 1 && c < summed; ++c) {
                    if (of_row) add(load_cells<W>(of_row, T::other_channel(cell, c), next));
                    if (of_column) add(load_cells<W>(of_column, T::other_channel(cell, c), next));
                  }
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
    dispatch_storage<A>(map.dtype, [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      write(static_cast<S*>(map.result) + corner);
    });
}

}  // namespace gatedrnn::cuda
