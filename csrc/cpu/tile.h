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
template <class A, class S>
GATEDRNN_INLINE void move_block(const S* from, int64_t rows, A* to, int64_t columns) {
  constexpr int side = kTile<A>;
  Vector<A, side> block[side];
#pragma GCC unroll 8
  for (int j = 0; j < side; ++j) block[j] = load_as<A, side>(from + j * rows);
  transpose(block);
#pragma GCC unroll 8
  for (int j = 0; j < side; ++j) store(to + j * columns, block[j]);
}

// Rows of `count` values, their steps apart, by whole registers and then one by one.
template <class T, class U, class Copy>
GATEDRNN_INLINE void copy_rows(const T* from, int64_t from_step, U* to, int64_t to_step,
                               int64_t rows, int64_t count, const Copy& copy) {
  constexpr int width = kCopy<U>;
  const std::integral_constant<int, width> whole;
  if (count == width || count == 2 * width) {
    const bool two = count == 2 * width;
    for (int64_t t = 0; t < rows; ++t, from += from_step, to += to_step) {
      copy(from, to, whole);
      if (two) copy(from + width, to + width, whole);
    }
    return;
  }
  for (int64_t t = 0; t < rows; ++t, from += from_step, to += to_step) {
    int64_t i = 0;
    for (; i + width <= count; i += width) copy(from + i, to + i, whole);
    for (; i < count; ++i) to[i] = value_of<U>(from[i]);
  }
}

// `ahead`: elements from this chunk to the next one to be packed.
template <class A, class S>
void pack(const S* source, const LineStrides& s, const TileShape& shape, A* tile, int64_t ahead) {
  const int64_t lanes = shape.lanes, step = shape.c * lanes;
  if (shape.l < lanes) std::fill(tile, tile + shape.t * step, A{});

  if (s.l == 1) {
    for (int64_t c = 0; c < shape.c; ++c)
      copy_rows(source + c * s.c, s.t, tile + c * lanes, step, shape.t, shape.l,
                [ahead](const S* from, auto* to, auto width) __attribute__((always_inline)) {
                  prefetch<false>(from, ahead);
                  store(to, load_as<A, width()>(from));
                });
    return;
  }

  Walk walk;
  if (!choose_walk(s, shape, walk)) {
    for (int64_t t = 0; t < shape.t; ++t)
      for (int64_t c = 0; c < shape.c; ++c)
        for (int64_t l = 0; l < shape.l; ++l)
          tile[t * step + c * lanes + l] = value_of<A>(source[t * s.t + c * s.c + l * s.l]);
    return;
  }
  constexpr int side = kTile<A>;
  for (int64_t o = 0; o < walk.outer; ++o) {
    const S* from = source + o * walk.outer_memory;
    A* to = tile + o * walk.outer_tile;
    const int64_t whole = shape.l - shape.l % side;
    int64_t i = 0;
    // Two blocks side by side take a whole cache line of a row before it can be evicted: rows a
    // power of two apart share few cache sets.
    for (; i + 2 * side <= walk.along; i += 2 * side) {
      for (int64_t l = 0; l < whole; l += side) {
        const S* corner = from + l * s.l + i;
        A* target = to + i * walk.along_tile + l;
        for (int j = 0; j < side; ++j) prefetch<false>(corner + j * s.l, ahead);
        move_block<A>(corner, s.l, target, walk.along_tile);
        move_block<A>(corner + side, s.l, target + side * walk.along_tile, walk.along_tile);
      }
      for (int64_t l = whole; l < shape.l; ++l)
        for (int j = 0; j < 2 * side; ++j)
          to[(i + j) * walk.along_tile + l] = value_of<A>(from[l * s.l + i + j]);
    }
    for (; i + side <= walk.along; i += side) {
      for (int64_t l = 0; l < whole; l += side)
        move_block<A>(from + l * s.l + i, s.l, to + i * walk.along_tile + l, walk.along_tile);
      for (int64_t l = whole; l < shape.l; ++l)
        for (int j = 0; j < side; ++j)
          to[(i + j) * walk.along_tile + l] = value_of<A>(from[l * s.l + i + j]);
    }
    for (; i < walk.along; ++i)
      for (int64_t l = 0; l < shape.l; ++l)
        to[i * walk.along_tile + l] = value_of<A>(from[l * s.l + i]);
  }
}

template <class A>
void unpack(const A* tile, A* target, const LineStrides& s, const TileShape& shape, int64_t ahead) {
  const int64_t lanes = shape.lanes, step = shape.c * lanes;
  if (s.l == 1) {
    for (int64_t c = 0; c < shape.c; ++c)
      copy_rows(tile + c * lanes, step, target + c * s.c, s.t, shape.t, shape.l,
                [ahead](const A* from, A* to, auto width) __attribute__((always_inline)) {
                  prefetch<true>(to, ahead);
                  store(to, load<Vector<A, width()>>(from));
                });
    return;
  }

  Walk walk;
  if (!choose_walk(s, shape, walk)) {
    for (int64_t t = 0; t < shape.t; ++t)
      for (int64_t c = 0; c < shape.c; ++c)
        for (int64_t l = 0; l < shape.l; ++l)
          target[t * s.t + c * s.c + l * s.l] = tile[t * step + c * lanes + l];
    return;
  }
  constexpr int side = kTile<A>;
  for (int64_t o = 0; o < walk.outer; ++o) {
    const A* from = tile + o * walk.outer_tile;
    A* to = target + o * walk.outer_memory;
    const int64_t whole = shape.l - shape.l % side;
    int64_t i = 0;
    for (; i + 2 * side <= walk.along; i += 2 * side) {
      for (int64_t l = 0; l < whole; l += side) {
        const A* corner = from + i * walk.along_tile + l;
        A* line = to + l * s.l + i;
        for (int j = 0; j < side; ++j) prefetch<true>(line + j * s.l, ahead);
        move_block<A>(corner, walk.along_tile, line, s.l);
        move_block<A>(corner + side * walk.along_tile, walk.along_tile, line + side, s.l);
      }
      for (int64_t l = whole; l < shape.l; ++l)
        for (int j = 0; j < 2 * side; ++j)
          to[l * s.l + i + j] = from[(i + j) * walk.along_tile + l];
    }
    for (; i + side <= walk.along; i += side) {
      for (int64_t l = 0; l < whole; l += side)
        move_block<A>(from + i * walk.along_tile + l, walk.along_tile, to + l * s.l + i, s.l);
      for (int64_t l = whole; l < shape.l; ++l)
        for (int j = 0; j < side; ++j) to[l * s.l + i + j] = from[(i + j) * walk.along_tile + l];
    }
    for (; i < walk.along; ++i)
      for (int64_t l = 0; l < shape.l; ++l) to[l * s.l + i] = from[i * walk.along_tile + l];
  }
}

}  // namespace gatedrnn::GATEDRNN_ISA
