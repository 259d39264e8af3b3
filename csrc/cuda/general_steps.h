// The recurrence and its adjoint in one tile for any block size: K = 0 in steps.h's terms.
#pragma once

#include "cuda/steps.h"

namespace gatedrnn::cuda {

// Any block size: a thread computes one channel of one line at a time, weights come from memory
// (the caches hold them), and the whole block waits after every step.
template <class A, int Side>
struct Steps<A, 0, Side, 0, 0> {
  using Value = A;
  static constexpr int kSide = Side;
  static constexpr int kThreads = 256;
  static constexpr int kChannels = 0;  // of a tile: known when it runs
  static constexpr int kPacks = 2;
  static constexpr int kGateSingles = 2 * kPacks;
  // Weights' sums are as large as K tiles or more: a direction's tiles along a line, which follow
  // each other, add to the same ones.
  static constexpr bool kSumsInChains = true;
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
      s.sums[q] = border.in ? load_shared_by_blocks(s.sums + q) + sum : sum;
    }
  }
};

}  // namespace gatedrnn::cuda
