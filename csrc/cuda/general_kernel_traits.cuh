// The recurrence and its adjoint in one tile, for any block size: KernelTraits with K = 0.
#pragma once

#include "cuda/kernel_traits.cuh"

namespace gatedrnn::cuda {

// A thread computes one channel of one line at a time. The weight is in global memory and in the
// caches. All threads of the block wait after every step.
template <class A, int Side>
struct KernelTraits<A, 0, Side, 0> {
  using Value = A;
  static constexpr int kSide = Side;
  static constexpr int kThreads = 256;
  static constexpr int kChannels = 0;  // of a tile; known at run time only
  static constexpr int kPacksInFlight = 4, kSinglesInFlight = 4;
  // The sums of a weight are as large as K tiles or more. So the tiles along a line, which follow
  // each other in time, add to one slot.
  static constexpr bool kSumsInChains = true;
  static constexpr int kSumsPerTile = 1;
  static constexpr bool kInPlace = false;
  static constexpr bool kNeedsStates = true;
  static constexpr bool kAdjointNoinline = false;
  static constexpr bool kBroadcastsGates = false;
  static constexpr int kScanBlocks = 2, kAdjointBlocks = 2;
  // A tile is [channel][row][column] with one unused row and column. The lanes of a warp are lines:
  // they touch different banks, along rows and along columns, and read the same weight. The unused
  // column holds the states at which lines start.
  static constexpr int kStride = Side + 1;
  static constexpr int kPixels = kStride * kStride + (20 - kStride * kStride % 16) % 16;

  static GATEDRNN_INLINE int channels(int64_t block) { return static_cast<int>(block); }
  static GATEDRNN_INLINE int cell(int row, int column, int channel) {
    return channel * kPixels + row * kStride + column;
  }
  // Moves from channel 0 of a pixel to another channel.
  static GATEDRNN_INLINE int other_channel(int cell, int channel) {
    return cell + channel * kPixels;
  }

  // Calls body(line, channel) for this thread's share of a step.
  template <class Body>
  static GATEDRNN_DEVICE void for_each_state(const Task& t, const LineWalk& walk, int d,
                                             const Body& body) {
    if (d < 0) return;
    for (int q = threadIdx.x % (kThreads / 2); q < Side * t.channels; q += kThreads / 2)
      if (q % Side < walk.lines) body(q % Side, q / Side);
  }
  // The place of pixel i of a line, or of the state before its first pixel.
  static GATEDRNN_DEVICE int place(const LineWalk& walk, int line, int i) {
    return i < 0 || i >= walk.length ? line * kStride + Side
                                     : walk.template cell<KernelTraits>(line, i, 0);
  }
  static GATEDRNN_DEVICE int gate_at(const LineWalk& walk, int step, int line, int i, int c) {
    return c * step + place(walk, line, i);
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
  static GATEDRNN_DEVICE void scan(const ScanArgs& a, const Task& t, int d, const LineWalk& walk,
                                   const ScanTiles<A>& s, const Border& border,
                                   const Ready& ready) {
    ready();
    const A* const w = static_cast<const A*>(a.weight) + (d * a.c + t.c0) * t.channels;
    const A* const b = a.bias ? static_cast<const A*>(a.bias) + d * a.c + t.c0 : nullptr;
    for_each_state(t, walk, d, [&](int line, int c) {
      s.h[c * kPixels + place(walk, line, -1)] =
          border.template load_carry<1>(line * t.channels + c).values[0];
    });
    for (int i = 0; i < most_steps(t); ++i) {
      __syncthreads();
      if (i >= walk.length) continue;
      for_each_state(t, walk, d, [&](int line, int c) {
        const int at = c * kPixels + place(walk, line, i);
        const A u = product(w + c * t.channels, 1, s.h + place(walk, line, i - 1), t.channels,
                            b ? b[c] : A(0));
        const A h =
            activated(a.nonlinearity, s.x[at], s.g[gate_at(walk, s.gate_step, line, i, c)], u);
        s.h[at] = h;
        if (i == walk.length - 1) border.store_carry(line * t.channels + c, Pack<A, 1>{h});
      });
    }
  }

  template <class Ready>
  static GATEDRNN_DEVICE void adjoint(const ScanArgs& a, const Task& t, int d, const LineWalk& walk,
                                      const AdjointTiles<A>& s, const Border<A>& border,
                                      const Ready& ready) {
    ready();
    const A* const w = static_cast<const A*>(a.weight) + (d * a.c + t.c0) * t.channels;
    const A* const b = a.bias ? static_cast<const A*>(a.bias) + d * a.c + t.c0 : nullptr;
    for_each_state(t, walk, d, [&](int line, int c) {
      s.e[c * kPixels + place(walk, line, -1)] =
          border.template load_carry<1>(line * t.channels + c).values[0];
    });
    for (int j = 0; j < most_steps(t); ++j) {
      __syncthreads();
      const int i = walk.length - 1 - j;
      if (i < 0) continue;
      for_each_state(t, walk, d, [&](int line, int c) {
        const int at = c * kPixels + place(walk, line, i);
        const A back = product(w + c, t.channels, s.e + place(walk, line, i + 1), t.channels, A(0));
        const A delta =
            activation_backward<ScalarMath<A>>(a.nonlinearity, s.h[at], s.dx[at] + back);
        const A e = s.g[gate_at(walk, s.gate_step, line, i, c)] * delta;
        s.e[at] = e;
        s.dx[at] = delta;
        if (s.dg)
          s.dg[at] = delta * product(w + c * t.channels, 1, s.h + place(walk, line, i - 1),
                                     t.channels, b ? b[c] : A(0));
        if (i == 0) border.store_carry(line * t.channels + c, Pack<A, 1>{e});
      });
    }
    __syncthreads();
    if (d < 0 || s.sums == nullptr) return;
    const int columns = t.channels + 1;
    for (int q = threadIdx.x % (kThreads / 2); q < t.channels * columns; q += kThreads / 2) {
      const int c = q / columns, k = q % columns;
      A sum = 0;
      for (int line = 0; line < walk.lines; ++line)
        for (int i = 0; i < walk.length; ++i) {
          const A e = s.e[c * kPixels + place(walk, line, i)];
          sum += k == t.channels ? e : e * s.h[k * kPixels + place(walk, line, i - 1)];
        }
      s.sums[q] = border.in ? load_bypass_l1(s.sums + q) + sum : sum;
    }
  }
};

}  // namespace gatedrnn::cuda
