// The recurrence on tiles: one chunk of a block of lines, forward and backward.
//
// Lines are SIMD lanes; a tile's row holds B registers of them. The product w h is blocked R output
// channels by B registers, so that each loaded weight serves B registers and each loaded state R
// channels. Channels of a tile are whole blocks of the weight ("groups" of a grouped convolution).
#pragma once

#include "cpu/simd.h"

namespace gatedrnn::GATEDRNN_ISA {

// Channels of the register block: R * B accumulators, B states and a weight must fit.
template <class A, int B>
constexpr int kRows = GATEDRNN_VECTOR_BYTES == 64 ? (B == 4 ? 4 : 8)
                      : B == 4                    ? 2
                                                  : 4;

// A map under a block of lines: the value of pixel t, channel c, lane i is data[t * t + c * c + i].
// A packed tile, or the caller's memory itself where the lines of the block lie side by side in it.
template <class T>
struct Map {
  T* data;
  int64_t t, c;  // steps in elements, 0 where the map is shared
};

// What a scan of one direction needs of its surroundings.
template <class A>
struct Chunk {
  int64_t length;    // pixels of this chunk
  bool reverse;      // scanned from the last pixel to the first
  int64_t channels;  // a multiple of block
  int64_t block;
  Nonlinearity nonlinearity;
  Map<const A> g;
  bool clamp;  // g is read in place and is yet to be clamped to [-1, 1]
};

template <class A>
struct ForwardChunk : Chunk<A> {
  Map<const A> x;
  int64_t ahead;  // pixels from one that is read in place to the one to ask for; 0: all is packed
  const A* w;     // [c][block]
  const A* bias;  // [c]
  A* state;       // [2][c][lane]: state[0] holds h before the chunk and afterwards h behind it
  A* h;           // [t][c][lane], kept for the backward pass or the merge itself; or null
  A* u;           // [t][c][lane], w h + b, kept for the backward pass; or null

  // Merged pixel by pixel, where m is not null.
  Merge merge;
  bool first;  // the first direction to reach m
  A scale;
  A* m;           // [t][c][lane], or null
  uint8_t* mask;  // [t][c][lane], or null
  uint8_t bit;
};

// The gate of a scan that reads it in place.
template <class A>
GATEDRNN_INLINE Wide<A> gate_at(const Chunk<A>& f, const A* g) {
  const Wide<A> value = load<Wide<A>>(g);
  return f.clamp ? gate_norm_of<VectorMath<Wide<A>>>(GateNorm::kClamp, value) : value;
}

// acc[r][b] += sum_k w[r][k] v[k][b]: the register block of the product.
template <int R, int B, int K, class A>
GATEDRNN_INLINE void accumulate(const A* w, const A* v, int64_t block, Wide<A> (&acc)[R][B]) {
  constexpr int lanes = kLanes<A>;
  if constexpr (K == 1) {  // a diagonal weight: channel r sees itself alone
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Wide<A> weight = splat<Wide<A>>(w[r]);
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) acc[r][b] += weight * load<Wide<A>>(v + (r * B + b) * lanes);
    }
    return;
  }
  const int64_t depth = K ? K : block;
  auto term = [&](int64_t k) __attribute__((always_inline)) {
    Wide<A> state[B];
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) state[b] = load<Wide<A>>(v + (k * B + b) * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Wide<A> weight = splat<Wide<A>>(w[r * depth + k]);
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) acc[r][b] += weight * state[b];
    }
  };
  if constexpr (K > 0 && K <= 8) {
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) term(k);
  } else {
    for (int64_t k = 0; k < depth; ++k) term(k);
  }
}

// One pixel, R channels from c on (all of one block), of Eq. (3): h_{i-1} `before`, h_i `after`.
template <int R, int B, int K, class A>
GATEDRNN_INLINE void forward_rows(const ForwardChunk<A>& f, int64_t t, int64_t c, const A* before,
                                  A* after) {
  constexpr int lanes = kLanes<A>, row = B * lanes;
  const int64_t block = K ? K : f.block;
  Wide<A> u[R][B];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Wide<A> bias = splat<Wide<A>>(f.bias[c + r]);
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) u[r][b] = bias;
  }
  accumulate<R, B, K>(f.w + c * block, before + c / block * block * row, block, u);

  const A* x = f.x.data + t * f.x.t + c * f.x.c;
  const A* g = f.g.data + t * f.g.t + c * f.g.c;
  if (f.ahead) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      prefetch<false>(x + r * f.x.c, f.ahead * f.x.t);
      prefetch<false>(g + r * f.g.c, f.ahead * f.g.t);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      const int64_t at = r * row + b * lanes;
      Wide<A> h = preactivation(load<Wide<A>>(x + r * f.x.c + b * lanes),
                                gate_at(f, g + r * f.g.c + b * lanes), u[r][b]);
      if (f.nonlinearity != Nonlinearity::kIdentity)
        h = activation<VectorMath<Wide<A>>>(f.nonlinearity, h);
      store(after + c * row + at, h);
      if (f.u) store(f.u + (t * f.channels + c) * row + at, u[r][b]);
    }
  }
}

// Merges the row h of one pixel into m; mask gets the bits of the winning directions.
template <int B, class A>
GATEDRNN_INLINE void merge_row(const ForwardChunk<A>& f, int64_t t, const A* h) {
  constexpr int lanes = kLanes<A>;
  typedef VectorMath<Wide<A>> M;
  const auto for_each = [&](const auto& merge) __attribute__((always_inline)) {
    for (int64_t c = 0; c < f.channels; ++c)
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b)
        merge((t * f.channels + c) * B * lanes + b * lanes, load<Wide<A>>(h + (c * B + b) * lanes));
  };
  A* const m = f.m;
  if (f.first) {
    for_each([&](int64_t i, Wide<A> value) __attribute__((always_inline)) {
      store(m + i, value * f.scale);
      if (f.mask) store(f.mask + i, splat<Bytes<Wide<A>>>(f.bit));
    });
  } else if (f.merge == Merge::kMax && f.mask) {
    for_each([&](int64_t i, Wide<A> value) __attribute__((always_inline)) {
      const Wide<A> old = load<Wide<A>>(m + i);
      record_winner(f.mask + i, value, old, f.bit);
      store(m + i, maximum<M>(value, old));
    });
  } else if (f.merge == Merge::kMax) {
    for_each([&](int64_t i, Wide<A> value) __attribute__((always_inline)) {
      store(m + i, maximum<M>(value, load<Wide<A>>(m + i)));
    });
  } else {
    for_each([&](int64_t i, Wide<A> value) __attribute__((always_inline)) {
      store(m + i, load<Wide<A>>(m + i) + value * f.scale);
    });
  }
}

// Calls rows<R>(c) for the channels of every block, in register blocks of R and what is left.
// Diagonal weights (K = 1) mix nothing, so that a register block may span all channels.
template <int R, int K, class Rows>
GATEDRNN_INLINE void for_each_rows(int64_t channels, int64_t block, const Rows& rows) {
  const int64_t size = K == 1 ? channels : K ? K : block;
  for (int64_t start = 0; start < channels; start += size) {
    int64_t c = 0;
    for (; c + R <= size; c += R) rows.template operator()<R>(start + c);
    if constexpr (K <= 1 || K % R != 0) {
      if constexpr (R > 4)
        for (; c + 4 <= size; c += 4) rows.template operator()<4>(start + c);
      for (; c + 2 <= size; c += 2) rows.template operator()<2>(start + c);
      for (; c < size; ++c) rows.template operator()<1>(start + c);
    }
  }
}

template <class A, int B, int K>
void forward_chunk(const ForwardChunk<A>& chunk) {
  const ForwardChunk<A> f = chunk;  // a copy that no store can alias
  const int64_t size = f.channels * B * kLanes<A>;
  const A* before = f.state;
  for (int64_t i = 0; i < f.length; ++i) {
    const int64_t t = f.reverse ? f.length - 1 - i : i;
    A* const after = f.h ? f.h + t * size : before == f.state ? f.state + size : f.state;
    for_each_rows<kRows<A, B>, K>(f.channels, f.block,
                                  [&]<int R>(int64_t c) __attribute__((always_inline)) {
                                    forward_rows<R, B, K>(f, t, c, before, after);
                                  });
    if (f.m) merge_row<B>(f, t, after);
    before = after;
  }
  if (before != f.state) std::copy(before, before + size, f.state);
}

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
      store(f.e + at, gate_at(f, g + r * f.g.c + b * lanes) * delta);
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
