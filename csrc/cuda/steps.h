// The recurrence and its adjoint along the lines of one tile in shared memory.
//
// Half of a block's threads walk the rows, the other half the columns, of the same tile of x and g.
// The weight's block size K is known when compiled: a thread keeps R output channels of one line in
// registers, with their weights. general_steps.h serves every other size.
#pragma once

#include "cuda/lines.h"

namespace gatedrnn::cuda {

template <class A, int K, int Side, int R, int Channels = (K < 8 ? 8 : K)>
struct Steps {
  static_assert(K == 1 || K % R == 0);
  using Value = A;
  static constexpr int kSide = Side;
  static constexpr int kChannels = Channels;  // of a tile
  static constexpr int kPacks = 4;            // that a thread reads at once
  // Elements of gates, which do not lie in packs: fewer for want of registers.
  static constexpr int kGateSingles = K == 8 ? 4 : 2 * kPacks;
  static constexpr int kChannelsPerThread = R;
  static constexpr int kSplits = kChannels / R;  // threads that share a line
  static constexpr int kLinesPerWarp = 32 / kSplits;
  static constexpr int kThreads = 2 * Side * kSplits;
  static constexpr bool kSumsInChains = false;
  static constexpr int kSumsPerTile = Side / kLinesPerWarp;  // one for each warp of a direction
  static constexpr int kPlane = tile_plane(Side);
  static constexpr int kOthers = K == 1 ? 0 : K - R, kGroups = kOthers / R;
  static constexpr bool kSeparateAdjoint = false;  // e takes the place of h
  static_assert(Side % kLinesPerWarp == 0);
  // Blocks of a multiprocessor for the compiler's choice of registers: what their tiles allow, as
  // long as nothing spills.
  static constexpr int blocks(int tiles, int most) {
    const int fit = kSharedMemory / (tiles * kChannels * kPlane * int{sizeof(A)} + 1024);
    return fit < 1 ? 1 : fit < most ? fit : most;
  }
  static constexpr int kScanBlocks = blocks(4, K < 8 ? 5 : K < 16 ? 6 : 2);
  static constexpr int kAdjointBlocks = blocks(7, K < 16 ? 3 : 2);
  static constexpr int kChunkBlocks = kThreads == 64 ? 8 : 3;

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
    scan(a, t, path, s, border, lane, Weights(a, t, d, lane, false));
  }
  template <class Border>
  static GATEDRNN_DEVICE void scan(const ScanArgs& a, const Task& t, const Path& path,
                                   const ScanTiles<A>& s, const Border& border, const Lane& lane,
                                   const Weights& w) {
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

}  // namespace gatedrnn::cuda
