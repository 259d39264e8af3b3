// What the steps of both passes share: maps under a block of lines, and the product w h.
//
// Lines are SIMD lanes; a tile's row holds B registers of them. The product w h is blocked R output
// channels by B registers, so that each loaded weight serves B registers and each loaded state R
// channels. Channels of a tile are whole blocks of the weight ("groups" of a grouped convolution).
#pragma once

#include "cpu/simd.h"

namespace gatedrnn::GATEDRNN_ISA {

// Channels of the register block: R * B accumulators, B states and a weight must fit.
template <class A, int B>
constexpr int kRows = (GATEDRNN_VECTOR_BYTES == 64 ? 16 : 8) / B;

// A map under a block of lines: the value of pixel t, channel c, lane i is data[t * t + c * c + i].
// A packed tile, or the caller's memory itself where the lines of the block lie side by side in it.
template <class T>
struct Map {
  T* data;
  int64_t t, c;  // steps in elements, 0 where the map is shared
};

// A pointer that walks over rows. The compiler is kept from seeing that they are evenly spaced: it
// would compute a pointer for every row in advance, and spill them all.
template <class T>
struct Walker {
  T* at;
  int64_t step;
  GATEDRNN_INLINE void next() {
    at += step;
    asm("" : "+r"(at));
  }
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

}  // namespace gatedrnn::GATEDRNN_ISA
