// The lines of a tile, the states at its borders, and what a direction works on.
#pragma once

#include "cuda/tile.h"

namespace gatedrnn::cuda {

// The lines of a tile in one direction; positions are in a plane of the tile.
struct Path {
  int axis, length, lines, step;
  bool from_end;

  template <int Side>
  static GATEDRNN_DEVICE Path of(const Task& t, int axis) {
    const int step = axis == 0 ? 1 : tile_stride(Side);
    return {axis, axis == 0 ? t.columns : t.rows, axis == 0 ? t.rows : t.columns,
            t.from_end ? -step : step, t.from_end};
  }
  template <int Side>
  GATEDRNN_DEVICE int first(int line) const {
    return line * (axis == 0 ? tile_stride(Side) : 1) - (from_end ? (length - 1) * step : 0);
  }
};

// The states at a tile's borders in one direction, in global memory, seen from the tile: `in` is
// null at the image's edge, where h_0 = 0; `out` is null where nobody asks for them.
template <class A>
struct Border {
  const A* in;
  A* out;
  int64_t channel;  // elements from one channel to the next

  static GATEDRNN_DEVICE Border of(const TilePlan& p, const Task& t, A* states, int axis,
                                   bool from_end) {
    const Cell before = p.upstream(t.cell, axis, from_end);
    return {p.inside(before) ? states + p.border(t.n, t.c0, before, axis) : nullptr,
            states + p.border(t.n, t.c0, t.cell, axis), p.border_size()};
  }
  GATEDRNN_DEVICE A enter(int channel_index, int line) const {
    return in ? load_shared_by_blocks(in + channel_index * channel + line) : A(0);
  }
  GATEDRNN_DEVICE void leave(int channel_index, int line, A state) const {
    if (out) out[channel_index * channel + line] = state;
  }
};

// What a direction of a tile works on. Planes of g have a stride of their own: 0 where one gate
// serves all channels.
template <class A>
struct ScanTiles {
  const A *x, *g;
  int g_plane;
  A* h;
};
template <class A>
struct AdjointTiles {
  const A* g;
  int g_plane;
  A* h;     // from the scan
  A* e;     // where steps keep it apart; else h is overwritten with it
  A* dx;    // before: the direction's share of dL/dy
  A* dg;    // null: not wanted
  A* sums;  // in global memory: [warp][channel][K + 1], dweight then dbias; null: not wanted
};

// Calls body with a function that names theta: a constant where theta is the identity, as is the
// rule, so that no branch stands in the loop over pixels.
template <class Body>
GATEDRNN_DEVICE void with_nonlinearity(Nonlinearity kind, const Body& body) {
  if (kind == Nonlinearity::kIdentity)
    body([] { return Nonlinearity::kIdentity; });
  else
    body([kind] { return kind; });
}

template <class A>
GATEDRNN_DEVICE A activated(Nonlinearity kind, A x, A g, A u) {
  return activation<ScalarMath<A>>(kind, preactivation(x, g, u));
}

}  // namespace gatedrnn::cuda
