// The recurrence and its adjoint in one tile for any block size: K = 0 in kernel_traits.cuh's terms.
#pragma once

#include "cuda/kernel_traits.cuh"

namespace gatedrnn::cuda {

// Any block size: a thread computes one channel of one line at a time, weights come from memory
// (the caches hold them), and the whole block waits after every step.
template <class A, int Side>
struct Steps<A, 0, Side, 0> {
  using Value = A;
  static constexpr int kSide = Side;
  static constexpr int kThreads = 256;
  static constexpr int kChannels = 0;  // of a tile: known when it runs
  static constexpr int kPacks = 4, kSingles = 4;
  // Weights' sums are as large as K tiles or more: a direction's tiles along a line, which follow
  // each other, add to the same ones.
  static constexpr bool kSumsInChains = true;
  static constexpr int kSumsPerTile = 1;
  static constexpr bool kInPlace = false;
  static constexpr bool kNeedsStates = true;
  static constexpr bool kAdjointApart = false;
  static constexpr bool kSpreadsGates = false;
  static constexpr int kScanBlocks = 2, kAdjointBlocks = 2;
  // A tile is [channel][row][column], with a column and a row to spare: a warp's lanes, which are
  // lines, meet different banks whether these are rows or columns, and all need the same weight.
  // The states that a line starts from stand beside it in the spare column.
  static constexpr int kStride = Side + 1;
  static constexpr int kPixels = kStride * kStride + (20 - kStride * kStride % 16) % 16;

  static GATEDRNN_INLINE int channels(int64_t block) { return static_cast<int>(block); }
  static GATEDRNN_INLINE int cell(int row, int column, int channel) {
    return channel * kPixels + row * kStride + column;
  }
  // From channel 0 of a pixel to another.
  static GATEDRNN_INLINE int other_channel(int cell, int channel) {
    return cell + channel * kPixels;
  }

  // Calls body(line, channel) for the threads' share of a step.
  template <class Body>
  static GATEDRNN_DEVICE void for_each_state(const Task& t, const Path& path, int d,
                                             const Body& body) {
    if (d < 0) return;
    for (int q = threadIdx.x % (kThreads / 2); q < Side * t.channels; q += kThreads / 2)
      if (q % Side < path.lines) body(q % Side, q / Side);
  }
  // The place of pixel i of a line, or of what it starts from.
  static GATEDRNN_DEVICE int place(const Path& path, int line, int i) {
    return i < 0 || i >= path.length ? line * kStride + Side
                                     : path.template cell<Steps>(line, i, 0);
  }
  static GATEDRNN_DEVICE int gate_at(const Path& path, int step, int line, int i, int c) {
    return c * step + place(path, line, i);
  }
  static GATEDRNN_DEVICE A product(const A* w, int64_t step, const A* states, int count, A sum) {
#pragma unroll 4
    for (int k = 0; k < count; ++k) sum += w[k * step] * states[k * kPixels];
    return sum;
  }
  static GATEDRNN_DEVICE int most_steps(const Task& t) {
    return t.rows > t.columns ? t.rows : t.columns;
  }

  template <class Border, class Ready>
  static GATEDRNN_DEVICE void scan(const ScanArgs& a, const Task& t, int d, const Path& path,
                                   const ScanTiles<A>& s, const Border& border,
                                   const Ready& ready) {
    ready();
    const A* const w = static_cast<const A*>(a.weight) + (d * a.c + t.c0) * t.channels;
    const A* const b = a.bias ? static_cast<const A*>(a.bias) + d * a.c + t.c0 : nullptr;
    for_each_state(t, path, d, [&](int line, int c) {
      s.h[c * kPixels + place(path, line, -1)] =
          border.template enter<1>(line * t.channels + c).values[0];
    });
    for (int i = 0; i < most_steps(t); ++i) {
      __syncthreads();
      if (i >= path.length) continue;
      for_each_state(t, path, d, [&](int line, int c) {
        const int at = c * kPixels + place(path, line, i);
        const A u = product(w + c * t.channels, 1, s.h + place(path, line, i - 1), t.channels,
                            b ? b[c] : A(0));
        const A h =
            activated(a.nonlinearity, s.x[at], s.g[gate_at(path, s.gate_step, line, i, c)], u);
        s.h[at] = h;
        if (i == path.length - 1) border.leave(line * t.channels + c, Pack<A, 1>{h});
      });
    }
  }

  template <class Ready>
  static GATEDRNN_DEVICE void adjoint(const ScanArgs& a, const Task& t, int d, const Path& path,
                                      const AdjointTiles<A>& s, const Border<A>& border,
                                      const Ready& ready) {
    ready();
    const A* const w = static_cast<const A*>(a.weight) + (d * a.c + t.c0) * t.channels;
    const A* const b = a.bias ? static_cast<const A*>(a.bias) + d * a.c + t.c0 : nullptr;
    for_each_state(t, path, d, [&](int line, int c) {
      s.e[c * kPixels + place(path, line, -1)] =
          border.template enter<1>(line * t.channels + c).values[0];
    });
    for (int j = 0; j < most_steps(t); ++j) {
      __syncthreads();
      const int i = path.length - 1 - j;
      if (i < 0) continue;
      for_each_state(t, path, d, [&](int line, int c) {
        const int at = c * kPixels + place(path, line, i);
        const A back = product(w + c, t.channels, s.e + place(path, line, i + 1), t.channels, A(0));
        const A delta =
            activation_backward<ScalarMath<A>>(a.nonlinearity, s.h[at], s.dx[at] + back);
        const A e = s.g[gate_at(path, s.gate_step, line, i, c)] * delta;
        s.e[at] = e;
        s.dx[at] = delta;
        if (s.dg)
          s.dg[at] = delta * product(w + c * t.channels, 1, s.h + place(path, line, i - 1),
                                     t.channels, b ? b[c] : A(0));
        if (i == 0) border.leave(line * t.channels + c, Pack<A, 1>{e});
      });
    }
    __syncthreads();
    if (d < 0 || s.sums == nullptr) return;
    const int columns = t.channels + 1;
    for (int q = threadIdx.x % (kThreads / 2); q < t.channels * columns; q += kThreads / 2) {
      const int c = q / columns, k = q % columns;
      A sum = 0;
      for (int line = 0; line < path.lines; ++line)
        for (int i = 0; i < path.length; ++i) {
          const A e = s.e[c * kPixels + place(path, line, i)];
          sum += k == t.channels ? e : e * s.h[k * kPixels + place(path, line, i - 1)];
        }
      s.sums[q] = border.in ? load_shared_by_blocks(s.sums + q) + sum : sum;
    }
  }
};

}  // namespace gatedrnn::cuda
