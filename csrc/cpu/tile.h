// Tiles: a block of lines laid out [t][c][lane], lanes contiguous, in the state's type.
//
// Everything about dtype, memory format and stride ends here; what is not packed is scanned in
// place (forward.h). A tile is read along whichever of the map's axes is contiguous; where that is
// not the lane axis, square blocks go through registers and are transposed.
#pragma once

#include "cpu/simd.h"

namespace gatedrnn::GATEDRNN_ISA {

struct TileShape {
  int64_t t, c, l;  // pixels, channels, lines in use (l <= lanes)
  int lanes;        // the tile's row; lanes beyond l are zero
};

// The plane of a tile that one block of transposes walks: `along` is contiguous in memory.
struct Walk {
  int64_t outer, outer_memory, outer_tile;  // count, step in memory, step in the tile
  int64_t along, along_tile;                // count, step in the tile (1 in memory)
};

// Chooses the walk over (outer, along) for maps that are contiguous along t or c.
inline bool choose_walk(const LineStrides& s, const TileShape& shape, Walk& walk) {
  const int64_t row = shape.lanes;
  if (s.t == 1) {
    walk = {shape.c, s.c, row, shape.t, shape.c * row};
    return true;
  }
  if (s.c == 1 && s.t == shape.c) {  // pixels of a line lie side by side with all their channels
    walk = {1, 0, 0, shape.t * shape.c, row};
    return true;
  }
  if (s.c == 1) {
    walk = {shape.t, s.t, shape.c * row, shape.c, row};
    return true;
  }
  return false;
}

// A square block, transposed from memory to the tile or back; rows and columns are the steps.
template <class A, class S, class Change>
GATEDRNN_INLINE void move_block(const S* from, int64_t rows, A* to, int64_t columns,
                                const Change& change) {
  constexpr int side = kTile<A>;
  Vector<A, side> block[side];
#pragma GCC unroll 8
  for (int j = 0; j < side; ++j) block[j] = change(load_as<A, side>(from + j * rows));
  transpose(block);
#pragma GCC unroll 8
  for (int j = 0; j < side; ++j) store(to + j * columns, block[j]);
}

// `ahead`: elements from this chunk to the next one to be packed; `change` is applied on the way.
template <class A, class S, class Change>
void pack(const S* source, const LineStrides& s, const TileShape& shape, A* tile, int64_t ahead,
          const Change& change) {
  const int64_t lanes = shape.lanes, step = shape.c * lanes;
  if (shape.l < lanes) std::fill(tile, tile + shape.t * step, A{});
  const auto single = [&](const S* from, A* to) __attribute__((always_inline)) {
    *to = change(Vector<A, 1>{value_of<A>(*from)})[0];
  };

  if (s.l == 1) {
    constexpr int width = kCopy<A>;
    for (int64_t c = 0; c < shape.c; ++c)
      for (int64_t t = 0; t < shape.t; ++t) {
        const S* const from = source + t * s.t + c * s.c;
        A* const to = tile + t * step + c * lanes;
        int64_t i = 0;
        for (; i + width <= shape.l; i += width) {
          prefetch<false>(from + i, ahead);
          store(to + i, change(load_as<A, width>(from + i)));
        }
        for (; i < shape.l; ++i) single(from + i, to + i);
      }
    return;
  }

  Walk walk;
  if (!choose_walk(s, shape, walk)) {
    for (int64_t t = 0; t < shape.t; ++t)
      for (int64_t c = 0; c < shape.c; ++c)
        for (int64_t l = 0; l < shape.l; ++l)
          single(source + t * s.t + c * s.c + l * s.l, tile + t * step + c * lanes + l);
    return;
  }
  constexpr int side = kTile<A>;
  const int64_t columns = walk.along_tile, whole = shape.l - shape.l % side;
  for (int64_t o = 0; o < walk.outer; ++o) {
    const S* const from = source + o * walk.outer_memory;
    A* const to = tile + o * walk.outer_tile;
    const auto rest = [&](int64_t begin, int64_t end, int64_t l0) {
      for (int64_t l = l0; l < shape.l; ++l)
        for (int64_t i = begin; i < end; ++i) single(from + l * s.l + i, to + i * columns + l);
    };
    int64_t i = 0;
    // Two blocks side by side take a whole cache line of a row before it can be evicted: rows a
    // power of two apart share few cache sets.
    for (; i + 2 * side <= walk.along; i += 2 * side) {
      for (int64_t l = 0; l < whole; l += side) {
        const S* const corner = from + l * s.l + i;
        A* const target = to + i * columns + l;
        for (int j = 0; j < side; ++j) prefetch<false>(corner + j * s.l, ahead);
        move_block<A>(corner, s.l, target, columns, change);
        move_block<A>(corner + side, s.l, target + side * columns, columns, change);
      }
      rest(i, i + 2 * side, whole);
    }
    for (; i + side <= walk.along; i += side) {
      for (int64_t l = 0; l < whole; l += side)
        move_block<A>(from + l * s.l + i, s.l, to + i * columns + l, columns, change);
      rest(i, i + side, whole);
    }
    rest(i, walk.along, 0);
  }
}

template <class A, class S>
void pack(const S* source, const LineStrides& s, const TileShape& shape, A* tile, int64_t ahead) {
  pack(source, s, shape, tile, ahead,
       [](auto value) __attribute__((always_inline)) { return value; });
}

// Transposes a square block of each of N tiles into memory, handing every row to the sink.
template <int N, class A, class Source, class Sink>
GATEDRNN_INLINE void emit_block(const Source& source, int64_t offset, int64_t columns, A* to,
                                int64_t rows, const Sink& sink) {
  constexpr int side = kTile<A>;
  Vector<A, side> block[N][side];
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n) {
#pragma GCC unroll 8
    for (int j = 0; j < side; ++j)
      block[n][j] = source(n, offset + j * columns, std::integral_constant<int, side>());
    transpose(block[n]);
  }
#pragma GCC unroll 8
  for (int j = 0; j < side; ++j) {
    if constexpr (N == 1)
      sink(to + j * rows, block[0][j]);
    else
      sink(to + j * rows, block[0][j], block[1][j]);
  }
}

// Moves N tiles into one map: source(n, offset, width) gives what tile n holds there, and
// sink(address, values...) writes the values of the N tiles that belong to an address.
template <int N, class A, class Source, class Sink>
void unpack(const Source& source, A* target, const LineStrides& s, const TileShape& shape,
            int64_t ahead, const Sink& sink) {
  const int64_t lanes = shape.lanes, step = shape.c * lanes;
  const auto emit = [&](int64_t offset, A* to, auto width) __attribute__((always_inline)) {
    if constexpr (N == 1)
      sink(to, source(0, offset, width));
    else
      sink(to, source(0, offset, width), source(1, offset, width));
  };
  const std::integral_constant<int, 1> one;

  if (s.l == 1) {
    constexpr int width = kCopy<A>;
    const std::integral_constant<int, width> whole;
    for (int64_t c = 0; c < shape.c; ++c)
      for (int64_t t = 0; t < shape.t; ++t) {
        A* const to = target + t * s.t + c * s.c;
        const int64_t from = t * step + c * lanes;
        int64_t i = 0;
        for (; i + width <= shape.l; i += width) {
          prefetch<true>(to + i, ahead);
          emit(from + i, to + i, whole);
        }
        for (; i < shape.l; ++i) emit(from + i, to + i, one);
      }
    return;
  }

  Walk walk;
  if (!choose_walk(s, shape, walk)) {
    for (int64_t t = 0; t < shape.t; ++t)
      for (int64_t c = 0; c < shape.c; ++c)
        for (int64_t l = 0; l < shape.l; ++l)
          emit(t * step + c * lanes + l, target + t * s.t + c * s.c + l * s.l, one);
    return;
  }
  constexpr int side = kTile<A>;
  const int64_t columns = walk.along_tile, whole = shape.l - shape.l % side;
  for (int64_t o = 0; o < walk.outer; ++o) {
    const int64_t from = o * walk.outer_tile;
    A* const to = target + o * walk.outer_memory;
    const auto rest = [&](int64_t begin, int64_t end, int64_t l0) {
      for (int64_t l = l0; l < shape.l; ++l)
        for (int64_t i = begin; i < end; ++i) emit(from + i * columns + l, to + l * s.l + i, one);
    };
    int64_t i = 0;
    for (; i + 2 * side <= walk.along; i += 2 * side) {
      for (int64_t l = 0; l < whole; l += side) {
        const int64_t corner = from + i * columns + l;
        A* const line = to + l * s.l + i;
        for (int j = 0; j < side; ++j) prefetch<true>(line + j * s.l, ahead);
        emit_block<N>(source, corner, columns, line, s.l, sink);
        emit_block<N>(source, corner + side * columns, columns, line + side, s.l, sink);
      }
      rest(i, i + 2 * side, whole);
    }
    for (; i + side <= walk.along; i += side) {
      for (int64_t l = 0; l < whole; l += side)
        emit_block<N>(source, from + i * columns + l, columns, to + l * s.l + i, s.l, sink);
      rest(i, i + side, whole);
    }
    rest(i, walk.along, 0);
  }
}

// One tile, written or added to what the map holds.
template <class A>
void unpack(const A* tile, A* target, const LineStrides& s, const TileShape& shape, int64_t ahead,
            bool add) {
  const auto source = [tile](int, int64_t offset, auto width) __attribute__((always_inline)) {
    return load<Vector<A, width()>>(tile + offset);
  };
  if (add)
    unpack<1>(source, target, s, shape, ahead, [](A* to, auto v) __attribute__((always_inline)) {
      store(to, load<decltype(v)>(to) + v);
    });
  else
    unpack<1>(source, target, s, shape, ahead,
              [](A* to, auto v) __attribute__((always_inline)) { store(to, v); });
}

}  // namespace gatedrnn::GATEDRNN_ISA
