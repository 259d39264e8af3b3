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
  const A* norm_derivative;  // of the gate, laid out as g, or null
  A* e;                      // [t][c][lane], written: e_i = g_i * delta_i
  A* delta;                  // [c][lane], scratch
  A* state;                  // [c][lane]: e of the pixel behind the chunk; afterwards of its first
  A* dx;                     // [t][c][lane], added to
  A* dg;                     // as g, added to; or null
};

// One pixel, R channels, of the adjoint of Eq. (3): delta = theta' (xi + w^T e_{i+1}), e = g delta.
template <int R, int B, int K, class A>
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
      store(f.e + at, load<Wide<A>>(g + r * f.g.c + b * lanes) * delta);
    }
  }
}

// What the recurrence does not wait for: dx and dg of one pixel from its row of delta.
template <class A>
GATEDRNN_INLINE void gradient_row(const BackwardChunk<A>& f, int64_t t, int64_t size, int64_t row) {
  constexpr int lanes = kLanes<A>;
  A* dx = f.dx + t * size;
  const A* u = f.u + t * size;
  if (!f.dg) {
    for (int64_t i = 0; i < size; i += lanes)
      store(dx + i, load<Wide<A>>(dx + i) + load<Wide<A>>(f.delta + i));
    return;
  }
  A* dg = f.dg + t * f.g.t;
  const A* derivative = f.norm_derivative ? f.norm_derivative + t * f.g.t : nullptr;
  if (f.g.c == 0) {  // one gate for all channels: their shares add up
    for (int64_t lane = 0; lane < row; lane += lanes) {
      Wide<A> sum{};
      for (int64_t i = lane; i < size; i += row) {
        const Wide<A> delta = load<Wide<A>>(f.delta + i);
        store(dx + i, load<Wide<A>>(dx + i) + delta);
        sum += delta * load<Wide<A>>(u + i);
      }
      if (derivative) sum *= load<Wide<A>>(derivative + lane);
      store(dg + lane, load<Wide<A>>(dg + lane) + sum);
    }
    return;
  }
  for (int64_t i = 0; i < size; i += lanes) {
    const Wide<A> delta = load<Wide<A>>(f.delta + i);
    store(dx + i, load<Wide<A>>(dx + i) + delta);
    Wide<A> share = delta * load<Wide<A>>(u + i);
    if (derivative) share *= load<Wide<A>>(derivative + i);
    store(dg + i, load<Wide<A>>(dg + i) + share);
  }
}

template <class A, int B, int K>
void backward_chunk(const BackwardChunk<A>& chunk) {
  const BackwardChunk<A> f = chunk;  // a copy that no store can alias
  constexpr int row = B * kLanes<A>;
  const int64_t size = f.channels * row;
  const A* next = f.state;
  for (int64_t i = f.length - 1; i >= 0; --i) {
    const int64_t t = f.reverse ? f.length - 1 - i : i;
    for_each_rows<kRows<A, B>, K>(f.channels, f.block,
                                  [&]<int R>(int64_t c) __attribute__((always_inline)) {
                                    backward_rows<R, B, K>(f, t, c, next);
                                  });
    gradient_row(f, t, size, row);
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
