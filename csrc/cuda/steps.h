// The recurrence and its adjoint along the lines of one tile in shared memory.
//
// Half of a block's threads walk the rows, the other half the columns, of the same tile of x and g.
// `Steps` knows the weight's block size K when it is compiled: a thread keeps R output channels of
// one line in registers, with their weights. `Steps` of K = 0 serves every size, from memory.
#pragma once

#include "cuda/tile.h"

namespace gatedrnn::cuda {

// The lines of a tile in one direction; positions are in a plane of the tile.
struct Path {
  int axis, length, lines, step;
  bool from_end;

  template <int Side>
  static GATEDRNN_DEVICE Path of(const Task& t, int axis) {
    const int step = axis == 0 ? 1 : tile_stride(Side);
    return {axis, axis == 0 ? t.columns : t.rows, axis == 0 ? t.rows : t.columns,
            t.from_end ? -step : step, t.from_end};
  }
  template <int Side>
  GATEDRNN_DEVICE int first(int line) const {
    return line * (axis == 0 ? tile_stride(Side) : 1) - (from_end ? (length - 1) * step : 0);
  }
};

// The states at a tile's borders in one direction, in global memory, seen from the tile: `in` is
// null at the image's edge, where h_0 = 0; `out` is null where nobody asks for them.
template <class A>
struct Border {
  const A* in;
  A* out;
  int64_t channel;  // elements from one channel to the next

  static GATEDRNN_DEVICE Border of(const TilePlan& p, const Task& t, A* states, int axis,
                                   bool from_end) {
    const Cell before = p.upstream(t.cell, axis, from_end);
    return {p.inside(before) ? states + p.border(t.n, t.c0, before, axis) : nullptr,
            states + p.border(t.n, t.c0, t.cell, axis), p.border_size()};
  }
  GATEDRNN_DEVICE A enter(int channel_index, int line) const {
    return in ? load_shared_by_blocks(in + channel_index * channel + line) : A(0);
  }
  GATEDRNN_DEVICE void leave(int channel_index, int line, A state) const {
    if (out) out[channel_index * channel + line] = state;
  }
};

// What a direction of a tile works on. Planes of g have a stride of their own: 0 where one gate
// serves all channels.
template <class A>
struct ScanTiles {
  const A *x, *g;
  int g_plane;
  A* h;
};
template <class A>
struct AdjointTiles {
  const A* g;
  int g_plane;
  A* h;     // from the scan
  A* e;     // where steps keep it apart; else h is overwritten with it
  A* dx;    // before: the direction's share of dL/dy
  A* dg;    // null: not wanted
  A* sums;  // in global memory: [warp][channel][K + 1], dweight then dbias; or null
};

// Calls body with a function that names theta: a constant where theta is the identity, as is the
// rule, so that no branch stands in the loop over pixels.
template <class Body>
GATEDRNN_DEVICE void with_nonlinearity(Nonlinearity kind, const Body& body) {
  if (kind == Nonlinearity::kIdentity)
    body([] { return Nonlinearity::kIdentity; });
  else
    body([kind] { return kind; });
}

template <class A>
GATEDRNN_DEVICE A activated(Nonlinearity kind, A x, A g, A u) {
  return activation<ScalarMath<A>>(kind, preactivation(x, g, u));
}

template <class A, int K, int Side, int R, int Channels = (K < 8 ? 8 : K)>
struct Steps {
  static_assert(K == 1 || K % R == 0);
  using Value = A;
  static constexpr int kSide = Side;
  static constexpr int kChannels = Channels;  // of a tile
  static constexpr int kChannelsPerThread = R;
  static constexpr int kSplits = kChannels / R;  // threads that share a line
  static constexpr int kLinesPerWarp = 32 / kSplits;
  static constexpr int kThreads = 2 * Side * kSplits;
  static constexpr int kSumsPerTile = Side / kLinesPerWarp;  // one for each warp of a direction
  static constexpr int kPlane = tile_plane(Side);
  static constexpr int kOthers = K == 1 ? 0 : K - R, kGroups = kOthers / R;
  static constexpr bool kSeparateAdjoint = false;  // e takes the place of h
  static_assert(Side % kLinesPerWarp == 0);
  // Blocks of a multiprocessor, as far as their tiles allow it on a Hopper GPU: for the compiler's
  // choice of registers.
  static constexpr int kScanBlocks = K < 16 ? 4 : 2, kAdjointBlocks = K < 16 ? 3 : 2;

  static GATEDRNN_INLINE int channels(int64_t) { return kChannels; }

  // A thread's line and first channel in its direction, and the other channels of its block, R by
  // R: all of them are computed by threads of the same warp.
  struct Lane {
    int line, channel, next[kGroups + 1];
    GATEDRNN_DEVICE Lane() {
      const int q = threadIdx.x % (kThreads / 2);
      line = q / 32 * kLinesPerWarp + q % kLinesPerWarp;
      channel = q % 32 / kLinesPerWarp * R;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) next[i] = channel / K * K + (channel % K + R * (i + 1)) % K;
    }
    GATEDRNN_DEVICE int other(int m) const { return next[m / R] + m % R; }  // m < kOthers
  };
  // The other channels of a place in a tile. It walks: an address that changes is kept in a
  // register, one that could be computed again would be, at every step.
  struct Others {
    const A* group[kGroups + 1];
    GATEDRNN_DEVICE Others(const A* tile, const Lane& lane, int cell) {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) group[i] = tile + lane.next[i] * kPlane + cell;
    }
    GATEDRNN_DEVICE void move(int cells) {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) group[i] += cells;
    }
    GATEDRNN_DEVICE void read(A (&values)[kOthers + 1]) const {
#pragma unroll
      for (int m = 0; m < kOthers; ++m) values[m] = group[m / R][m % R * kPlane];
    }
  };
  // Weights of R channels, or of the transposed weight: from the thread's own channels, then from
  // the others.
  struct Weights {
    A own[R][K == 1 ? 1 : R], others[R][kOthers + 1], bias[R];
    GATEDRNN_DEVICE Weights(const ScanArgs& a, const Task& t, int d, const Lane& lane,
                            bool transposed) {
      const A* const w = static_cast<const A*>(a.weight) + (d * a.c + t.c0) * K;
      const A* const b = static_cast<const A*>(a.bias);
      const auto at = [&](int to, int from) {
        if (to >= t.channels) return A(0);
        return transposed ? w[from * K + to % K] : w[to * K + from % K];
      };
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int c = lane.channel + r;
        bias[r] = b && !transposed && c < t.channels ? b[d * a.c + t.c0 + c] : A(0);
        if constexpr (K == 1) {
          own[r][0] = at(c, c);
        } else {
#pragma unroll
          for (int j = 0; j < R; ++j) own[r][j] = at(c, lane.channel + j);
#pragma unroll
          for (int m = 0; m < kOthers; ++m) others[r][m] = at(c, lane.other(m));
        }
      }
    }
    // bias + w v, from v of the thread's own channels and of the others.
    GATEDRNN_DEVICE void product(const A (&v)[R], const A (&v_others)[kOthers + 1],
                                 A (&u)[R]) const {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        u[r] = bias[r];
        if constexpr (K == 1) {
          u[r] += own[r][0] * v[r];
        } else {
#pragma unroll
          for (int j = 0; j < R; ++j) u[r] += own[r][j] * v[j];
        }
#pragma unroll
        for (int m = 0; m < kOthers; ++m) u[r] += others[r][m] * v_others[m];
      }
    }
  };

  // h of every pixel, Eq. (3). All threads of a block; those of an axis without a direction
  // (d < 0) have nothing to do.
  template <class Border>
  static GATEDRNN_DEVICE void scan(const ScanArgs& a, const Task& t, int d, const Path& path,
                                   const ScanTiles<A>& s, const Border& border) {
    if (d < 0) return;
    const Lane lane;
    const Weights w(a, t, d, lane, false);
    const bool valid = lane.line < path.lines;
    const int before = entry_cell<Side>(lane.line), first = path.template first<Side>(lane.line);
    A* h_at = s.h + lane.channel * kPlane;
    A h[R], x[R], g[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      h[r] =
          valid && lane.channel + r < t.channels ? border.enter(lane.channel + r, lane.line) : A(0);
      h_at[r * kPlane + before] = h[r];
    }
    h_at += first;
    Others others(s.h, lane, before);
    const A* x_at = s.x + lane.channel * kPlane + first;
    const A* g_at = s.g + lane.channel * s.g_plane + first;
    const auto fetch = [&] {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        x[r] = x_at[r * kPlane];
        g[r] = g_at[r * s.g_plane];
      }
    };
    if (valid) fetch();
    __syncwarp();
    with_nonlinearity(a.nonlinearity, [&](auto theta) {
      int move = first - before;  // the entry lies elsewhere
      for (int i = 0; i < path.length; ++i) {
        if (valid) {
          A u[R], h_others[kOthers + 1];
          others.read(h_others);
          w.product(h, h_others, u);
#pragma unroll
          for (int r = 0; r < R; ++r) {
            h[r] = activated(theta(), x[r], g[r], u[r]);
            h_at[r * kPlane] = h[r];
          }
          others.move(move);
          move = path.step;
          h_at += path.step;
          x_at += path.step;
          g_at += path.step;
          if (i + 1 < path.length) fetch();  // ahead of the recurrence
        }
        __syncwarp();
      }
    });
    if (valid)
#pragma unroll
      for (int r = 0; r < R; ++r)
        if (lane.channel + r < t.channels) border.leave(lane.channel + r, lane.line, h[r]);
  }

  // The adjoint, against the direction. After scan(), with the tile's h in place.
  static GATEDRNN_DEVICE void adjoint(const ScanArgs& a, const Task& t, int d, const Path& path,
                                      const AdjointTiles<A>& s, const Border<A>& border) {
    if (d < 0) return;
    const Lane lane;
    const Weights w(a, t, d, lane, false), transposed(a, t, d, lane, true);
    const bool valid = lane.line < path.lines;
    constexpr int own = K == 1 ? 1 : R;
    A e[R], weight_own[R][own] = {}, weight_others[R][kOthers + 1] = {}, bias[R] = {};
    const int entry = entry_cell<Side>(lane.line), after = adjoint_entry_cell<Side>(lane.line);
    const int first = path.template first<Side>(lane.line);
    const int last = first + (path.length - 1) * path.step;
    A* const plane = s.h + lane.channel * kPlane;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      e[r] =
          valid && lane.channel + r < t.channels ? border.enter(lane.channel + r, lane.line) : A(0);
      plane[r * kPlane + after] = e[r];
    }
    // Places that walk against the direction: of this pixel, of e after it and of h before it.
    const int from = path.length > 1 ? last - path.step : entry;
    A *h_at = plane + last, *dx_at = s.dx + lane.channel * kPlane + last;
    A* dg_at = s.dg ? s.dg + lane.channel * kPlane + last : nullptr;
    const A *g_at = s.g + lane.channel * s.g_plane + last, *h_from = plane + from;
    Others e_others(s.h, lane, after), h_others(s.h, lane, from);
    __syncwarp();
    with_nonlinearity(a.nonlinearity, [&](auto theta) {
      int move = last - after;
      for (int i = path.length - 1; i >= 0; --i) {
        if (valid) {
          A back[R], u[R], h[R], others[kOthers + 1];
          e_others.read(others);
          transposed.product(e, others, back);
#pragma unroll
          for (int r = 0; r < R; ++r) h[r] = h_from[r * kPlane];
          h_others.read(others);
          w.product(h, others, u);
#pragma unroll
          for (int r = 0; r < R; ++r) {
            const A delta = activation_backward<ScalarMath<A>>(theta(), h_at[r * kPlane],
                                                               dx_at[r * kPlane] + back[r]);
            e[r] = g_at[r * s.g_plane] * delta;
            h_at[r * kPlane] = e[r];  // nobody else reads this h: its readers are one step further
            dx_at[r * kPlane] = delta;
            if (dg_at) dg_at[r * kPlane] = delta * u[r];
            bias[r] += e[r];
            if constexpr (K == 1) {
              weight_own[r][0] += e[r] * h[r];
            } else {
#pragma unroll
              for (int j = 0; j < R; ++j) weight_own[r][j] += e[r] * h[j];
            }
#pragma unroll
            for (int m = 0; m < kOthers; ++m) weight_others[r][m] += e[r] * others[m];
          }
          const int back_by = i > 1 ? -path.step : entry - first;
          h_from += back_by;
          h_others.move(back_by);
          e_others.move(move);
          move = -path.step;
          h_at -= path.step;
          dx_at -= path.step;
          g_at -= path.step;
          if (dg_at) dg_at -= path.step;
        }
        __syncwarp();
      }
    });
    if (valid)
#pragma unroll
      for (int r = 0; r < R; ++r)
        if (lane.channel + r < t.channels) border.leave(lane.channel + r, lane.line, e[r]);
    if (s.sums == nullptr) return;

    // The lines of a warp are summed in the order of a tree; every warp has a slot of its own.
    A* const slot = s.sums + lane.line / kLinesPerWarp * kChannels * (K + 1);
    const auto store = [&](int c, int k, A value) {
#pragma unroll
      for (int lines = kLinesPerWarp / 2; lines > 0; lines /= 2)
        value += __shfl_xor_sync(0xffffffff, value, lines);
      if (lane.line % kLinesPerWarp == 0) slot[c * (K + 1) + k] = value;
    };
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int c = lane.channel + r;
      store(c, K, bias[r]);
      if constexpr (K == 1) {
        store(c, 0, weight_own[r][0]);
      } else {
#pragma unroll
        for (int j = 0; j < R; ++j) store(c, (lane.channel + j) % K, weight_own[r][j]);
#pragma unroll
        for (int m = 0; m < kOthers; ++m) store(c, lane.other(m) % K, weight_others[r][m]);
      }
    }
  }
};

// Any block size: a thread computes one channel of one line at a time, weights come from memory
// (the caches hold them), and the whole block waits after every step.
template <class A, int Side>
struct Steps<A, 0, Side, 0, 0> {
  using Value = A;
  static constexpr int kSide = Side;
  static constexpr int kThreads = 256;
  static constexpr int kSumsPerTile = 1;
  static constexpr int kPlane = tile_plane(Side);
  static constexpr bool kSeparateAdjoint = true;
  static constexpr int kScanBlocks = 2, kAdjointBlocks = 2;

  static GATEDRNN_INLINE int channels(int64_t block) { return static_cast<int>(block); }

  // Calls body(line, channel) for the threads' share of a step.
  template <class Body>
  static GATEDRNN_DEVICE void for_each_state(const Task& t, const Path& path, int d,
                                             const Body& body) {
    if (d < 0) return;
    for (int q = threadIdx.x % (kThreads / 2); q < Side * t.channels; q += kThreads / 2)
      if (q % Side < path.lines) body(q % Side, q / Side);
  }
  static GATEDRNN_DEVICE A product(const A* w, int64_t step, const A* tile, int cell, int k_count,
                                   A sum) {
#pragma unroll 4
    for (int k = 0; k < k_count; ++k) sum += w[k * step] * tile[k * kPlane + cell];
    return sum;
  }
  static GATEDRNN_DEVICE int most_steps(const Task& t) {
    return t.rows > t.columns ? t.rows : t.columns;
  }

  template <class Border>
  static GATEDRNN_DEVICE void scan(const ScanArgs& a, const Task& t, int d, const Path& path,
                                   const ScanTiles<A>& s, const Border& border) {
    const A* const w = static_cast<const A*>(a.weight) + (d * a.c + t.c0) * t.channels;
    const A* const b = a.bias ? static_cast<const A*>(a.bias) + d * a.c + t.c0 : nullptr;
    for_each_state(t, path, d, [&](int line, int c) {
      s.h[c * kPlane + entry_cell<Side>(line)] = border.enter(c, line);
    });
    for (int i = 0; i < most_steps(t); ++i) {
      __syncthreads();
      if (i >= path.length) continue;
      for_each_state(t, path, d, [&](int line, int c) {
        const int cell = path.template first<Side>(line) + i * path.step;
        const int before = i > 0 ? cell - path.step : entry_cell<Side>(line);
        const A u = product(w + c * t.channels, 1, s.h, before, t.channels, b ? b[c] : A(0));
        const A h = activated(a.nonlinearity, s.x[c * kPlane + cell], s.g[c * s.g_plane + cell], u);
        s.h[c * kPlane + cell] = h;
        if (i == path.length - 1) border.leave(c, line, h);
      });
    }
  }

  static GATEDRNN_DEVICE void adjoint(const ScanArgs& a, const Task& t, int d, const Path& path,
                                      const AdjointTiles<A>& s, const Border<A>& border) {
    const A* const w = static_cast<const A*>(a.weight) + (d * a.c + t.c0) * t.channels;
    const A* const b = a.bias ? static_cast<const A*>(a.bias) + d * a.c + t.c0 : nullptr;
    for_each_state(t, path, d, [&](int line, int c) {
      s.e[c * kPlane + adjoint_entry_cell<Side>(line)] = border.enter(c, line);
    });
    for (int j = 0; j < most_steps(t); ++j) {
      __syncthreads();
      const int i = path.length - 1 - j;
      if (i < 0) continue;
      for_each_state(t, path, d, [&](int line, int c) {
        const int cell = path.template first<Side>(line) + i * path.step;
        const int before = i > 0 ? cell - path.step : entry_cell<Side>(line);
        const int after = j > 0 ? cell + path.step : adjoint_entry_cell<Side>(line);
        const int at = c * kPlane + cell;
        const A back = product(w + c, t.channels, s.e, after, t.channels, A(0));
        const A delta =
            activation_backward<ScalarMath<A>>(a.nonlinearity, s.h[at], s.dx[at] + back);
        const A e = s.g[c * s.g_plane + cell] * delta;
        s.e[at] = e;
        s.dx[at] = delta;
        if (s.dg)
          s.dg[at] =
              delta * product(w + c * t.channels, 1, s.h, before, t.channels, b ? b[c] : A(0));
        if (i == 0) border.leave(c, line, e);
      });
    }
    __syncthreads();
    if (d < 0 || s.sums == nullptr) return;
    const int columns = t.channels + 1;
    for (int q = threadIdx.x % (kThreads / 2); q < t.channels * columns; q += kThreads / 2) {
      const int c = q / columns, k = q % columns;
      A sum = 0;
      for (int line = 0; line < path.lines; ++line) {
        int cell = path.template first<Side>(line), before = entry_cell<Side>(line);
        for (int i = 0; i < path.length; ++i) {
          const A e = s.e[c * kPlane + cell];
          sum += k == t.channels ? e : e * s.h[k * kPlane + before];
          before = cell;
          cell += path.step;
        }
      }
      s.sums[q] = sum;
    }
  }
};

}  // namespace gatedrnn::cuda
