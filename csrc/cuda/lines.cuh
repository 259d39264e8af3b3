// The lines of a tile, the carries at its borders, and the inputs and outputs of a direction.
#pragma once

#include "cuda/tile.cuh"

namespace gatedrnn::cuda {

// The lines of a tile, and the order in which a direction visits their pixels.
struct LineWalk {
  int axis, length, lines;
  bool from_end;
  bool whole;  // whether the lines fill the tile

  template <int Side>
  static GATEDRNN_DEVICE LineWalk of(const Task& t, int axis) {
    return {axis, axis == 0 ? t.columns : t.rows, axis == 0 ? t.rows : t.columns, t.from_end,
            t.rows == Side && t.columns == Side};
  }
  GATEDRNN_DEVICE LineWalk reversed() const { return {axis, length, lines, !from_end, whole}; }
  // The place of pixel i of a line in a tile.
  template <class T>
  GATEDRNN_DEVICE int cell(int line, int i, int channel) const {
    if (from_end) i = length - 1 - i;
    return axis == 0 ? T::cell(line, i, channel) : T::cell(i, line, channel);
  }
};

// The carries of a tile in one direction, in global memory. `in` is null at the edge of the image,
// where h_0 = 0. `out` is null if nobody reads the carries.
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
  // Carries of W channels. `at` counts lines, and channels of a line.
  template <int W>
  GATEDRNN_DEVICE Pack<A, W> load_carry(int at) const {
    return in ? load_bypass_l1(&pack_at<W>(in + at)) : Pack<A, W>{};
  }
  template <int W>
  GATEDRNN_DEVICE void store_carry(int at, const Pack<A, W>& states) const {
    if (out) pack_at<W>(out + at) = states;
  }
};

// What a direction reads and writes in a tile. `gate_step` is 0 if one gate serves all channels.
template <class A>
struct ScanTiles {
  const A *x, *g;
  int gate_step;
  A* h;  // null if it is not kept
};
template <class A>
struct AdjointTiles {
  const A* g;
  int gate_step;
  A* h;     // From the scan.
  A* e;     // Used if the traits keep e in a tile.
  A* dx;    // On entry, the direction's share of dL/dy.
  A* dg;    // Null if it is not wanted. May take the place of h.
  A* sums;  // In global memory: [channel][K + 1], dweight then dbias. Null if not wanted.
};

// Calls body with a function that returns theta. It is a constant for the identity, the usual case,
// so that the loop over pixels has no branch.
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
