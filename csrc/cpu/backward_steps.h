// The adjoint of the recurrence on tiles: one chunk of a block of lines, and its share of dw and
// db.
#pragma once

#include "cpu/steps.h"

namespace gatedrnn::GATEDRNN_ISA {

template <class A>
struct BackwardChunk : Chunk<A> {
  const A* w_transposed;  // [c][block]: column c of its block
  const A* xi;            // [t][c][lane], dL/dy; shared among the winners where mask is set
  const uint8_t* mask;    // [t][c][lane] or null
  uint8_t bit;
  A scale;
  const A* h;  // [t][c][lane], kept by forward_chunk
  const A* u;
  const A* gate_derivative;  // of the gate, laid out as g; null also for a clamp, which needs none
  A* e;                      // [t][c][lane], written: e_i = g_i * delta_i
  A* delta;                  // [c][lane], scratch
  A* state;                  // [c][lane]: e of the pixel behind the chunk; afterwards of its first
  A* dx;                     // [t][c][lane]
  A* dg;                     // as g, or null
  bool fresh_dx, fresh_dg;   // written, not added to
};

template <bool Clamp, class V>
GATEDRNN_INLINE V gate_of(V g) {
  if constexpr (Clamp) return clamp_gate(g);
  return g;
}
template <bool Fresh, class V, class A>
GATEDRNN_INLINE void put(A* to, V v) {
  store(to, Fresh ? v : load<V>(to) + v);
}

// One pixel, R channels, of the adjoint of Eq. (3): delta = theta' (xi + w^T e_{i+1}), e = g delta.
template <int R, int B, int K, bool Clamp, class A>
GATEDRNN_INLINE void backward_rows(const BackwardChunk<A>& f, int64_t t, int64_t c, const A* next) {
  constexpr int lanes = kLanes<A>, row = B * lanes;
  const int64_t block = K ? K : f.block;
  Wide<A> v[R][B] = {};
  accumulate<R, B, K>(f.w_transposed + c * block, next + c / block * block * row, block, v);

  const int64_t offset = (t * f.channels + c) * row;
  const A* g = f.g.data + t * f.g.t + c * f.g.c;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      const int64_t at = offset + r * row + b * lanes;
      Wide<A> xi = load<Wide<A>>(f.xi + at);
      if (f.mask) xi = where_bit(f.mask + at, f.bit, xi);
      Wide<A> delta = xi * f.scale + v[r][b];
      if (f.nonlinearity != Nonlinearity::kIdentity)
        delta = activation_backward<VectorMath<Wide<A>>>(f.nonlinearity, load<Wide<A>>(f.h + at),
                                                         delta);
      store(f.delta + c * row + r * row + b * lanes, delta);
      store(f.e + at, gate_of<Clamp>(load<Wide<A>>(g + r * f.g.c + b * lanes)) * delta);
    }
  }
}

// What the recurrence does not wait for: dx and dg of one pixel from its row of delta.
template <bool Clamp, class A>
GATEDRNN_INLINE void gradient_row(const BackwardChunk<A>& f, int64_t t, int64_t size, int64_t row) {
  constexpr int lanes = kLanes<A>;
  typedef Wide<A> V;
  const auto add = [](A* to, V v, bool fresh)
                       __attribute__((always_inline)) { store(to, fresh ? v : load<V>(to) + v); };
  A* const dx = f.dx + t * size;
  for (int64_t i = 0; i < size; i += lanes) add(dx + i, load<V>(f.delta + i), f.fresh_dx);
  if (!f.dg) return;
  const A* const u = f.u + t * size;
  const A* const g = f.g.data + t * f.g.t;
  A* const dg = f.dg + t * f.g.t;
  const A* const derivative = f.gate_derivative ? f.gate_derivative + t * f.g.t : nullptr;
  // One gate for all channels: their shares add up.
  const int64_t count = f.g.c ? size : row;
  for (int64_t i = 0; i < count; i += lanes) {
    V share{};
    for (int64_t j = i; j < size; j += f.g.c ? size : row)
      share += load<V>(f.delta + j) * load<V>(u + j);
    if (derivative) share *= load<V>(derivative + i);
    if constexpr (Clamp) share = where_within(load<V>(g + i), share);
    add(dg + i, share, f.fresh_dg);
  }
}

// The whole chunk for one block of the weight and one register of lanes, as forward_in_registers.
template <int B, int K, bool Clamp, bool Masked, bool Fresh, class A>
void backward_in_registers(const BackwardChunk<A>& f, int64_t c, int64_t lane) {
  constexpr int row = B * kLanes<A>;
  typedef Wide<A> V;
  A* const state = f.state + c * row + lane;
  V e[K];
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) e[k] = load<V>(state + k * row);
  for (int64_t i = f.length - 1; i >= 0; --i) {
    const int64_t t = f.reverse ? f.length - 1 - i : i;
    V v[K] = {};
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 8
      for (int r = 0; r < K; ++r) v[r] += splat<V>(f.w_transposed[(c + r) * K + k]) * e[k];
    const int64_t corner = (t * f.channels + c) * row + lane;
    Walker<const A> g{f.g.data + t * f.g.t + c * f.g.c + lane, f.g.c};
#pragma GCC unroll 8
    for (int r = 0; r < K; ++r) {
      const int64_t at = corner + r * row;
      V xi = load<V>(f.xi + at);
      if constexpr (Masked) xi = where_bit(f.mask + at, f.bit, xi);
      const V delta = xi * f.scale + v[r], gate = load<V>(g.at);
      e[r] = gate_of<Clamp>(gate) * delta;
      store(f.e + at, e[r]);
      put<Fresh>(f.dx + at, delta);
      V share = delta * load<V>(f.u + at);
      if constexpr (Clamp) share = where_within(gate, share);
      put<Fresh>(f.dg + at, share);
      g.next();
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) store(state + k * row, e[k]);
}

template <class A, int B, int K, bool Clamp>
void backward_chunk(const BackwardChunk<A>& chunk) {
  const BackwardChunk<A> f = chunk;  // a copy that no store can alias
  constexpr int row = B * kLanes<A>;
  if constexpr (GATEDRNN_VECTOR_BYTES == 64 && K == 8) {
    if (f.nonlinearity == Nonlinearity::kIdentity && f.dg && f.g.c && !f.gate_derivative &&
        f.fresh_dx == f.fresh_dg) {
      const auto step = f.mask ? f.fresh_dx ? backward_in_registers<B, K, Clamp, true, true, A>
                                            : backward_in_registers<B, K, Clamp, true, false, A>
                        : f.fresh_dx ? backward_in_registers<B, K, Clamp, false, true, A>
                                     : backward_in_registers<B, K, Clamp, false, false, A>;
      for (int64_t c = 0; c < f.channels; c += K)
        for (int64_t lane = 0; lane < row; lane += kLanes<A>) step(f, c, lane);
      return;
    }
  }
  const int64_t size = f.channels * row;
  const A* next = f.state;
  for (int64_t i = f.length - 1; i >= 0; --i) {
    const int64_t t = f.reverse ? f.length - 1 - i : i;
    for_each_rows<kRows<A, B>, K>(f.channels, f.block,
                                  [&]<int R>(int64_t c) __attribute__((always_inline)) {
                                    backward_rows<R, B, K, Clamp>(f, t, c, next);
                                  });
    gradient_row<Clamp>(f, t, size, row);
    next = f.e + t * size;
  }
  std::copy(next, next + size, f.state);
}

template <class A>
struct WeightGradient {
  int64_t length;
  bool reverse;
  int64_t channels, block;
  const A* e;       // [t][c][lane]
  const A* h;       // [t][c][lane]
  const A* before;  // [c][lane]: h before the chunk
  A* dweight;       // [c][block][register lane], added to
  A* dbias;         // [c][register lane], added to
};

// dw += sum_i e_i h_{i-1}^T for R x K channels, lanes apart; with k = 0 also db += sum_i e_i.
// K = 0 stands for diagonal weights: R channels, each with itself.
template <int R, int K, int B, class A>
GATEDRNN_INLINE void outer_products(const WeightGradient<A>& f, int64_t c, int64_t k) {
  constexpr int lanes = kLanes<A>, row = B * lanes;
  constexpr int columns = K ? K : 1;
  const int64_t size = f.channels * row, block = K ? f.block : 1;
  const int64_t right_row = (K ? c / block * block + k : c) * row;
  A* const target = f.dweight + (c * block + k) * lanes;
  Wide<A> acc[R][columns], sum[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    sum[r] = load<Wide<A>>(f.dbias + (c + r) * lanes);
#pragma GCC unroll 8
    for (int j = 0; j < columns; ++j) acc[r][j] = load<Wide<A>>(target + (r * block + j) * lanes);
  }
  const A* previous = f.before + right_row;
  for (int64_t i = 0; i < f.length; ++i) {
    const int64_t t = f.reverse ? f.length - 1 - i : i;
    const A* e = f.e + t * size + c * row;
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      Wide<A> left[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        left[r] = load<Wide<A>>(e + r * row + b * lanes);
        sum[r] += left[r];
        if constexpr (K == 0) acc[r][0] += left[r] * load<Wide<A>>(previous + r * row + b * lanes);
      }
#pragma GCC unroll 8
      for (int j = 0; j < K; ++j) {
        const Wide<A> right = load<Wide<A>>(previous + j * row + b * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r][j] += left[r] * right;
      }
    }
    previous = f.h + t * size + right_row;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    if (k == 0) store(f.dbias + (c + r) * lanes, sum[r]);
#pragma GCC unroll 8
    for (int j = 0; j < columns; ++j) store(target + (r * block + j) * lanes, acc[r][j]);
  }
}

template <class A, int B>
void weight_gradient(const WeightGradient<A>& f) {
  constexpr int rows = GATEDRNN_VECTOR_BYTES == 64 ? 4 : 2;
  if (f.block == 1) {
    for_each_rows<rows, 1>(f.channels, 1, [&]<int R>(int64_t c) __attribute__((always_inline)) {
      outer_products<R, 0, B>(f, c, 0);
    });
    return;
  }
  for_each_rows<rows, 0>(f.channels, f.block, [&]<int R>(int64_t c) __attribute__((always_inline)) {
    int64_t k = 0;
    for (; k + 4 <= f.block; k += 4) outer_products<R, 4, B>(f, c, k);
    for (; k < f.block; ++k) outer_products<R, 1, B>(f, c, k);
  });
}

}  // namespace gatedrnn::GATEDRNN_ISA
