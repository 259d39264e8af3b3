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
constexpr int kRows = GATEDRNN_VECTOR_BYTES == 64 ? (B == 1 ? 8 : B == 2 ? 8 : 4) : 4;

template <class A>
struct GateTile {
  const A* data;    // [t][c|1][lane]; a single row for a scan without a gate
  int64_t t, c;     // steps in elements, 0 where the row is shared
};

// What a scan of one direction needs of its surroundings.
template <class A>
struct Chunk {
  int64_t length;    // pixels of this chunk
  bool reverse;      // scanned from the last pixel to the first
  int64_t channels;  // a multiple of block
  int64_t block;
  Nonlinearity nonlinearity;
  GateTile<A> g;
};

template <class A>
struct ForwardChunk : Chunk<A> {
  const A* x;     // [t][c][lane]
  const A* w;     // [c][block]
  const A* bias;  // [c]
  A* state;       // [2][c][lane]: state[0] holds h before the chunk and afterwards h behind it

  // Either merge into m (and mask), or, in the backward pass, keep h and u = w h + b.
  Merge merge;
  bool first;  // the first direction to reach m
  A scale;
  A* m;
  uint8_t* mask;
  uint8_t bit;
  A* h;
  A* u;
};

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

template <class A, int B>
GATEDRNN_INLINE void merge_into(const ForwardChunk<A>& f, int64_t offset, Wide<A> h) {
  A* m = f.m + offset;
  switch (f.merge) {
    case Merge::kMax: {
      typedef Vector<uint8_t, kLanes<A>> Bytes;
      if (f.first) {
        store(m, h);
        if (f.mask) store(f.mask + offset, splat<Bytes>(f.bit));
        return;
      }
      const Wide<A> old = load<Wide<A>>(m);
      const Mask<Wide<A>> wins = beats(h, old);
      store(m, select(wins, h, old));
      if (f.mask) {
        const auto held = __builtin_convertvector(load<Bytes>(f.mask + offset), Mask<Wide<A>>);
        const Mask<Wide<A>> bit = Mask<Wide<A>>{} + f.bit;
        const Mask<Wide<A>> next = wins ? bit : (held | ((h == old) & bit));
        store(f.mask + offset, __builtin_convertvector(next, Bytes));
      }
      return;
    }
    case Merge::kNone:
      store(m, h);
      return;
    case Merge::kMean:
    case Merge::kSum:
      store(m, f.first ? h * f.scale : load<Wide<A>>(m) + h * f.scale);
      return;
  }
}

// One pixel, R channels from c on (all of one block), of Eq. (3).
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

  const int64_t offset = (t * f.channels + c) * row;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      const int64_t at = offset + r * row + b * lanes;
      const Wide<A> g = load<Wide<A>>(f.g.data + t * f.g.t + (c + r) * f.g.c + b * lanes);
      Wide<A> h = preactivation(load<Wide<A>>(f.x + at), g, u[r][b]);
      if (f.nonlinearity != Nonlinearity::kIdentity) h = activation<VectorMath<Wide<A>>>(f.nonlinearity, h);
      store(after + (c + r) * row + b * lanes, h);
      if (f.h) {
        store(f.h + at, h);
        store(f.u + at, u[r][b]);
      } else if (f.m) {
        merge_into<A, B>(f, at, h);
      }
    }
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
void forward_chunk(const ForwardChunk<A>& f) {
  const int64_t size = f.channels * B * kLanes<A>;
  A* before = f.state;
  A* after = f.state + size;
  for (int64_t i = 0; i < f.length; ++i) {
    const int64_t t = f.reverse ? f.length - 1 - i : i;
    for_each_rows<kRows<A, B>, K>(
        f.channels, f.block, [&]<int R>(int64_t c) __attribute__((always_inline)) {
          forward_rows<R, B, K>(f, t, c, before, after);
        });
    std::swap(before, after);
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
  const A* h;     // [t][c][lane], kept by forward_chunk
  const A* u;
  const A* norm_derivative;  // of the gate, laid out as g, or null
  A* e;                      // [t][c][lane], written: e_i = g_i * delta_i
  A* state;                  // [c][lane]: e of the pixel behind the chunk; afterwards of its first
  A* dx;                     // [t][c][lane], added to
  A* dg;                     // as g, added to; or null
};

// One pixel, R channels, of the adjoint of Eq. (3): delta = theta' (xi + w^T e_{i+1}).
template <int R, int B, int K, class A>
GATEDRNN_INLINE void backward_rows(const BackwardChunk<A>& f, int64_t t, int64_t c, const A* next) {
  constexpr int lanes = kLanes<A>, row = B * lanes;
  typedef Mask<Wide<A>> I;
  const int64_t block = K ? K : f.block;
  Wide<A> v[R][B] = {};
  accumulate<R, B, K>(f.w_transposed + c * block, next + c / block * block * row, block, v);

  const int64_t offset = (t * f.channels + c) * row;
  Wide<A> dg_sum[B] = {};
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      const int64_t at = offset + r * row + b * lanes;
      const int64_t gate_at = t * f.g.t + (c + r) * f.g.c + b * lanes;
      Wide<A> xi = load<Wide<A>>(f.xi + at) * f.scale;
      if (f.mask) {
        typedef Vector<uint8_t, kLanes<A>> Bytes;
        const I winners = __builtin_convertvector(load<Bytes>(f.mask + at), I);
        xi = select((winners & f.bit) != 0, xi, Wide<A>{});
      }
      Wide<A> delta = xi + v[r][b];
      if (f.nonlinearity != Nonlinearity::kIdentity)
        delta = activation_backward<VectorMath<Wide<A>>>(f.nonlinearity, load<Wide<A>>(f.h + at), delta);
      store(f.e + at, load<Wide<A>>(f.g.data + gate_at) * delta);
      store(f.dx + at, load<Wide<A>>(f.dx + at) + delta);
      if (f.dg) {
        Wide<A> dg = delta * load<Wide<A>>(f.u + at);
        if (f.norm_derivative) dg *= load<Wide<A>>(f.norm_derivative + gate_at);
        if (f.g.c != 0)
          store(f.dg + gate_at, load<Wide<A>>(f.dg + gate_at) + dg);
        else
          dg_sum[b] += dg;
      }
    }
  }
  if (f.dg && f.g.c == 0) {
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      A* dg = f.dg + t * f.g.t + b * lanes;
      store(dg, load<Wide<A>>(dg) + dg_sum[b]);
    }
  }
}

template <class A, int B, int K>
void backward_chunk(const BackwardChunk<A>& f) {
  const int64_t size = f.channels * B * kLanes<A>;
  const A* next = f.state;
  for (int64_t i = f.length - 1; i >= 0; --i) {
    const int64_t t = f.reverse ? f.length - 1 - i : i;
    for_each_rows<kRows<A, B>, K>(
        f.channels, f.block, [&]<int R>(int64_t c) __attribute__((always_inline)) {
          backward_rows<R, B, K>(f, t, c, next);
        });
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
