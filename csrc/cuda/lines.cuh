// The lines of a tile, the states at its borders, and what a direction works on.
#pragma once

#include "cuda/tile.cuh"

namespace gatedrnn::cuda {

// The lines of a tile in one direction.
struct LineWalk {
  int axis, length, lines;
  bool from_end;
  bool whole;  // length and lines fill the tile

  template <int Side>
  static GATEDRNN_DEVICE LineWalk of(const Task& t, int axis) {
    return {axis, axis == 0 ? t.columns : t.rows, axis == 0 ? t.rows : t.columns, t.from_end,
            t.rows == Side && t.columns == Side};
  }
  GATEDRNN_DEVICE LineWalk reversed() const { return {axis, length, lines, !from_end, whole}; }
  // The place in a tile of pixel i of a line.
  template <class T>
  GATEDRNN_DEVICE int cell(int line, int i, int channel) const {
    if (from_end) i = length - 1 - i;
    return axis == 0 ? T::cell(line, i, channel) : T::cell(i, line, channel);
  }
};

// The states at a tile's borders in one direction, in global memory, seen from the tile: `in` is
// null at the image's edge, where h_0 = 0; `out` is null where nobody asks for them.
template <class A>
struct Border {
  const A* in;
  A* out;

  static GATEDRNN_DEVICE Border of(const TilePlan& p, const Task& t, A* states, int axis,
                                   bool from_end) {
    const Cell before = p.upstream(t.cell, axis, from_end);
    return {p.inside(before) ? states + p.border(t.unit, before, axis) : nullptr,
            states + p.border(t.unit, t.cell, axis)};
  }
  // Those of W channels; `at` counts lines and their channels.
  template <int W>
  GATEDRNN_DEVICE Pack<A, W> load_carry(int at) const {
    return in ? load_bypass_l1(&pack_at<W>(in + at)) : Pack<A, W>{};
  }
  template <int W>
  GATEDRNN_DEVICE void store_carry(int at, const Pack<A, W>& states) const {
    if (out) pack_at<W>(out + at) = states;
  }
};

// What a direction of a tile works on. `gate_step` is 0 where steps take one gate for all channels.
template <class A>
struct ScanTiles {
  const A *x, *g;
  int gate_step;
  A* h;  // null where steps can do without
};
template <class A>
struct AdjointTiles {
  const A* g;
  int gate_step;
  A* h;     // from the scan
  A* e;     // where steps keep it in a tile
  A* dx;    // before: the direction's share of dL/dy
  A* dg;    // null: not wanted; may take the place of h where steps say so
  A* sums;  // in global memory: [channel][K + 1], dweight then dbias; null: not wanted
};

// Calls body with a function that names theta: a constant where theta is the identity, as is the
// rule, so that no branch stands in the loop over pixels.
template <class Body>
GATEDRNN_DEVICE void dispatch_nonlinearity(Nonlinearity kind, const Body& body) {
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
