// Tiles in shared memory: [channel][row][column] in the state's type, for one direction or both.
//
// A row has one column to spare and a plane one row: states that enter the tile stand there. With
// that padding a warp meets different banks whether its lanes are rows or columns, and channel
// planes are four banks apart (mod 16), so that lanes may also differ in their channel.
#pragma once

#include "cuda/plan.h"
#include "cuda/values.h"

namespace gatedrnn::cuda {

GATEDRNN_INLINE constexpr int tile_stride(int side) { return side + 1; }
GATEDRNN_INLINE constexpr int tile_plane(int side) {
  const int plane = tile_stride(side) * tile_stride(side);
  return plane + (20 - plane % 16) % 16;
}
// Where the states enter that a scan, or an adjoint, starts a line from.
template <int Side>
GATEDRNN_INLINE int entry_cell(int line) {
  return line * tile_stride(Side) + Side;
}
template <int Side>
GATEDRNN_INLINE int adjoint_entry_cell(int line) {
  return Side * tile_stride(Side) + line;
}

// Two tiles, for rows and for columns; with a step of 0 they are one.
template <class A>
struct Pair {
  A* first;
  int step;
  GATEDRNN_DEVICE A* operator[](int axis) const { return first + axis * step; }
};

// An axis of a box of elements: how many, and the steps from one to the next.
struct BoxAxis {
  int count;
  int64_t memory;
  int tile;
};

// The threads that share out a copy.
struct Team {
  int rank, size;
  static GATEDRNN_DEVICE Team block() {
    return {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
  }
};

// The elements of a tile in the order in which threads should walk them: `inner` is contiguous in
// memory where any axis is.
struct Box {
  BoxAxis inner, middle, outer;
};
template <int Side>
GATEDRNN_DEVICE Box box_of(const Task& t, int channels, const Strides& s) {
  const BoxAxis c{channels, s.c, tile_plane(Side)}, i{t.rows, s.h, tile_stride(Side)},
      j{t.columns, s.w, 1};
  if (s.w == 1 || (s.c != 1 && s.h != 1)) return {j, i, c};
  return s.c == 1 && channels > 1 ? Box{c, j, i} : Box{i, j, c};
}
// Elements from the map's start to the tile's; `c` is 0 in maps of one channel.
GATEDRNN_DEVICE int64_t tile_corner(const TilePlan& p, const Task& t, const Strides& s, int64_t d,
                                    int64_t c) {
  return t.n * s.n + d * s.d + c * s.c + int64_t{t.cell.row} * p.side * s.h +
         int64_t{t.cell.column} * p.side * s.w;
}

// Calls body(offset in memory, offset in the tile) for every element.
template <class Body>
GATEDRNN_DEVICE void for_each_element(const Team& team, const Box& box, const Body& body) {
  for (int p = team.rank; p < box.inner.count * box.middle.count; p += team.size) {
    const int a = p % box.inner.count, b = p / box.inner.count;
    int64_t memory = a * box.inner.memory + b * box.middle.memory;
    int tile = a * box.inner.tile + b * box.middle.tile;
    for (int c = 0; c < box.outer.count; ++c) {
      body(memory, tile);
      memory += box.outer.memory;
      tile += box.outer.tile;
    }
  }
}

// Reads a tile from global memory and calls put(place in the tile, value). Eight loads are under
// way before the first is used.
template <class A, class S, class Put>
GATEDRNN_DEVICE void read_tile(const Team& team, const Box& box, const S* __restrict__ from,
                               const Put& put) {
  constexpr int batch = 8;
  for (int p = team.rank; p < box.inner.count * box.middle.count; p += team.size) {
    const int a = p % box.inner.count, b = p / box.inner.count;
    const S* source = from + a * box.inner.memory + b * box.middle.memory;
    int cell = a * box.inner.tile + b * box.middle.tile;
    for (int first = 0; first < box.outer.count; first += batch) {
      S values[batch];
#pragma unroll
      for (int k = 0; k < batch; ++k)
        if (first + k < box.outer.count) values[k] = source[k * box.outer.memory];
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        if (first + k < box.outer.count) put(cell, to_state<A>(values[k]));
        cell += box.outer.tile;
      }
      source += batch * box.outer.memory;
    }
  }
}

// The same for a tile of a map of x's dtype: x, gates, dL/dy.
template <int Side, class A, class Put>
GATEDRNN_DEVICE void read_map(const Team& team, const TilePlan& p, const Task& t, Dtype dtype,
                              const void* map, const Strides& s, int64_t d, bool has_channels,
                              const Put& put) {
  const Box box = box_of<Side>(t, has_channels ? t.channels : 1, s);
  const int64_t corner = tile_corner(p, t, s, d, has_channels ? t.c0 : 0);
  with_storage<A>(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    read_tile<A>(team, box, static_cast<const S*>(map) + corner, put);
  });
}

template <int Side, class A>
GATEDRNN_DEVICE void load_input(const Team& team, const TilePlan& p, const Task& t,
                                const ScanArgs& a, A* tile) {
  read_map<Side, A>(team, p, t, a.dtype, a.x, a.x_strides, 0, true,
                    [&](int cell, A v) { tile[cell] = v; });
}

// Gates under their norm, of direction d. Without g, one plane of ones.
template <int Side, class A>
GATEDRNN_DEVICE void load_gate(const Team& team, const TilePlan& p, const Task& t,
                               const ScanArgs& a, int64_t d, A* tile) {
  if (a.g == nullptr) {
    for (int i = team.rank; i < tile_plane(Side); i += team.size) tile[i] = A(1);
    return;
  }
  read_map<Side, A>(
      team, p, t, a.dtype, a.g, a.g_strides, a.gate_directions ? d : 0, a.gate_channels,
      [&](int cell, A v) { tile[cell] = gate_norm_of<ScalarMath<A>>(a.gate_norm, v); });
}

// Those of a pass: into one tile, or into one for each axis where they differ.
template <int Side, class A>
GATEDRNN_DEVICE void load_gates(const TilePlan& p, const Task& t, const ScanArgs& a,
                                const Pair<A>& tiles) {
  for (int axis = 0; axis < (a.gate_directions ? kAxes : 1); ++axis) {
    const int d = p.direction[t.pass][axis];
    if (!a.gate_directions || d >= 0) load_gate<Side>(Team::block(), p, t, a, d, tiles[axis]);
  }
}

}  // namespace gatedrnn::cuda
