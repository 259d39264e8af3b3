// The recurrence on tiles: one chunk of a block of lines.
#pragma once

#include "cpu/steps.h"

namespace gatedrnn::GATEDRNN_ISA {

template <class A>
struct ForwardChunk : Chunk<A> {
  Map<const A> x;
  const A* w;     // [c][block]
  const A* bias;  // [c]
  A* state;       // [c][lane]: h before the chunk, and afterwards h behind it
  A* h;           // [t][c][lane], written
  A* u;           // [t][c][lane], w h + b, written where the scan keeps it
};

// What a scan does besides Eq. (3), known when it is compiled: a branch for every register would
// cost as much as the arithmetic.
enum class Also {
  kNothing,
  kClamp,  // gates are yet to be clamped to [-1, 1]
  kKeep,   // u is kept for the backward pass
  kClampAndKeep,
};
constexpr bool clamps(Also also) { return also == Also::kClamp || also == Also::kClampAndKeep; }
constexpr bool keeps(Also also) { return also == Also::kKeep || also == Also::kClampAndKeep; }

// The end of one pixel for R channels by B registers of lanes, in a tile of Row lanes: v holds
// u = w h + b and gets a_i of Eq. (3), which goes into h's tile as well.
template <int R, int B, int Row, Also also, class A>
GATEDRNN_INLINE void end_pixel(const ForwardChunk<A>& f, int64_t t, int64_t c, int64_t lane,
                               Wide<A> (&v)[R][B]) {
  constexpr int lanes = kLanes<A>;
  Walker<const A> x{f.x.data + t * f.x.t + c * f.x.c + lane, f.x.c};
  Walker<const A> g{f.g.data + t * f.g.t + c * f.g.c + lane, f.g.c};
  const int64_t corner = (t * f.channels + c) * Row + lane;
  Walker<A> h{f.h + corner, Row}, kept{f.u + corner, Row};
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      Wide<A> gate = load<Wide<A>>(g.at + b * lanes);
      if constexpr (clamps(also)) gate = clamp_gate(gate);
      if constexpr (keeps(also)) store(kept.at + b * lanes, v[r][b]);
      v[r][b] = preactivation(load<Wide<A>>(x.at + b * lanes), gate, v[r][b]);
      store(h.at + b * lanes, v[r][b]);
    }
    x.next(), g.next(), h.next(), kept.next();
  }
}

// One pixel, R channels from c on, all of one block; `before` is the row of h_{i-1}.
template <int R, int B, int K, Also also, class A>
GATEDRNN_INLINE void forward_rows(const ForwardChunk<A>& f, int64_t t, int64_t c, const A* before) {
  constexpr int row = B * kLanes<A>;
  const int64_t block = K ? K : f.block;
  Wide<A> v[R][B];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Wide<A> bias = splat<Wide<A>>(f.bias[c + r]);
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) v[r][b] = bias;
  }
  accumulate<R, B, K>(f.w + c * block, before + c / block * block * row, block, v);
  end_pixel<R, B, row, also>(f, t, c, 0, v);
}

// The whole chunk for one block of the weight and one register of lanes. All states of the block
// and as many sums fit the registers beside a weight, so that no state goes through memory, where
// its store would wait for a port that the multiply-adds take.
template <int B, int K, Also also, class A>
GATEDRNN_INLINE void forward_in_registers(const ForwardChunk<A>& f, int64_t c, int64_t lane) {
  constexpr int row = B * kLanes<A>;
  A* const state = f.state + c * row + lane;
  Wide<A> h[K][1];
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) h[k][0] = load<Wide<A>>(state + k * row);
  for (int64_t i = 0; i < f.length; ++i) {
    const int64_t t = f.reverse ? f.length - 1 - i : i;
    Wide<A> v[K][1];
#pragma GCC unroll 8
    for (int r = 0; r < K; ++r) v[r][0] = splat<Wide<A>>(f.bias[c + r]);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 8
      for (int r = 0; r < K; ++r) v[r][0] += splat<Wide<A>>(f.w[(c + r) * K + k]) * h[k][0];
    end_pixel<K, 1, row, also>(f, t, c, lane, v);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) h[k][0] = v[k][0];
  }
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) store(state + k * row, h[k][0]);
}

template <class A, int B, int K, Also also>
void forward_chunk(const ForwardChunk<A>& chunk) {
  const ForwardChunk<A> f = chunk;  // a copy that no store can alias
  constexpr int row = B * kLanes<A>;
  const bool identity = f.nonlinearity == Nonlinearity::kIdentity;
  if constexpr (GATEDRNN_VECTOR_BYTES == 64 && K == 8) {
    if (identity) {
      for (int64_t c = 0; c < f.channels; c += K)
        for (int64_t lane = 0; lane < row; lane += kLanes<A>)
          forward_in_registers<B, K, also>(f, c, lane);
      return;
    }
  }
  const int64_t size = f.channels * row;
  const A* before = f.state;
  for (int64_t i = 0; i < f.length; ++i) {
    const int64_t t = f.reverse ? f.length - 1 - i : i;
    for_each_rows<kRows<A, B>, K>(f.channels, f.block,
                                  [&]<int R>(int64_t c) __attribute__((always_inline)) {
                                    forward_rows<R, B, K, also>(f, t, c, before);
                                  });
    A* const h = f.h + t * size;
    if (!identity)
      for (int64_t j = 0; j < size; j += kLanes<A>)
        store(h + j, activation<VectorMath<Wide<A>>>(f.nonlinearity, load<Wide<A>>(h + j)));
    before = h;
  }
  std::copy(before, before + size, f.state);
}

}  // namespace gatedrnn::GATEDRNN_ISA
