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
template <int Size>
struct Team {
  static constexpr int kSize = Size;
  int rank;
};
// All threads of a block of steps T.
template <class T>
GATEDRNN_DEVICE Team<T::kThreads> whole_block() {
  return {static_cast<int>(threadIdx.x)};
}

// The elements of a tile in the order in which threads should walk them: `inner` is contiguous in
// memory where any axis is.
struct Box {
  BoxAxis inner, middle, outer;
  bool channels_inside;  // channels are the inner axis, else the outer one
};
template <int Side>
GATEDRNN_DEVICE Box box_of(const Task& t, int channels, const Strides& s) {
  const BoxAxis c{channels, s.c, tile_plane(Side)}, i{t.rows, s.h, tile_stride(Side)},
      j{t.columns, s.w, 1};
  if (s.w == 1 || (s.c != 1 && s.h != 1)) return {j, i, c, false};
  return s.c == 1 && channels > 1 ? Box{c, j, i, true} : Box{i, j, c, false};
}
// Elements from the map's start to the tile's; `c` is 0 in maps of one channel.
GATEDRNN_DEVICE int64_t tile_corner(const TilePlan& p, const Task& t, const Strides& s, int64_t d,
                                    int64_t c) {
  return t.n * s.n + d * s.d + c * s.c + int64_t{t.cell.row} * p.side * s.h +
         int64_t{t.cell.column} * p.side * s.w;
}

// The elements of a box for each thread, N at a time: load(offset in memory, offset in the tile) of
// all N, then use(the same, what was loaded) of each. It is the number of loads under way that hides
// the latency of memory. Inner and Middle are powers of two, so that places are found by shifts:
// Middle is at least the axis' count, a longer inner axis is walked piece by piece.
template <int Inner, int Middle, int N, int Size, class Load, class Use>
GATEDRNN_DEVICE void walk_box(const Team<Size>& team, const Box& box, const Load& load,
                              const Use& use) {
  constexpr int at_once = Size / Inner;  // places along middle that the threads take side by side
  constexpr int repeats = at_once < Middle ? Middle / at_once : 1;  // of a thread along middle
  constexpr int step = at_once > Middle ? at_once / Middle : 1;     // of a thread along outer
  constexpr int along_middle = repeats < N ? repeats : N, along_outer = N / along_middle;
  static_assert(Size % Inner == 0 && N % along_middle == 0 && repeats % along_middle == 0);
  const int first = team.rank / Inner % Middle;
#pragma unroll 1
  for (int a = team.rank % Inner; a < box.inner.count; a += Inner)
#pragma unroll 1
    for (int c = team.rank / (Inner * Middle); c < box.outer.count; c += along_outer * step)
#pragma unroll 1
      for (int b = first; b < first + repeats * at_once; b += along_middle * at_once) {
        const int64_t memory = a * box.inner.memory + b * box.middle.memory + c * box.outer.memory;
        const int tile = a * box.inner.tile + b * box.middle.tile + c * box.outer.tile;
        const auto inside = [&](int k) {
          return b + k % along_middle * at_once < box.middle.count &&
                 c + k / along_middle * step < box.outer.count;
        };
        const auto place = [&](int k) {
          return memory + k % along_middle * at_once * box.middle.memory +
                 k / along_middle * step * box.outer.memory;
        };
        const auto cell = [&](int k) {
          return tile + k % along_middle * at_once * box.middle.tile +
                 k / along_middle * step * box.outer.tile;
        };
        decltype(load(memory, tile)) values[N];
#pragma unroll
        for (int k = 0; k < N; ++k)
          if (inside(k)) values[k] = load(place(k), cell(k));
#pragma unroll
        for (int k = 0; k < N; ++k)
          if (inside(k)) use(place(k), cell(k), values[k]);
      }
}
template <class T, int N, int Size, class Load, class Use>
GATEDRNN_DEVICE void walk_box(const Team<Size>& team, const Box& box, const Load& load,
                              const Use& use) {
  if (box.channels_inside)
    walk_box<T::kChannelPitch, T::kSide, N>(team, box, load, use);
  else
    walk_box<T::kSide, T::kSide, N>(team, box, load, use);
}

// Calls use(offset in memory, offset in the tile) for every element.
template <class T, int Size, class Use>
GATEDRNN_DEVICE void for_each_element(const Team<Size>& team, const Box& box, const Use& use) {
  walk_box<T, T::kLoads / 2>(
      team, box, [](int64_t, int) { return false; },
      [&](int64_t at, int cell, bool) { use(at, cell); });
}

// Reads a tile of a map of x's dtype: x, gates, dL/dy. Values beyond +-limit are cut.
template <class T, int Size>
GATEDRNN_DEVICE void read_map(const Team<Size>& team, const TilePlan& p, const Task& t, Dtype dtype,
                              const void* map, const Strides& s, int64_t d, bool has_channels,
                              typename T::Value limit, typename T::Value* tile) {
  using A = typename T::Value;
  const Box box = box_of<T::kSide>(t, has_channels ? t.channels : 1, s);
  const int64_t corner = tile_corner(p, t, s, d, has_channels ? t.c0 : 0);
  with_storage<A>(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const S* const __restrict__ from = static_cast<const S*>(map) + corner;
    walk_box<T, T::kLoads>(
        team, box, [&](int64_t at, int) { return from[at]; },
        [&](int64_t, int cell, S value) {
          A v = to_state<A>(value);
          v = v > limit ? limit : v;
          tile[cell] = v < -limit ? -limit : v;  // NaN stays NaN
        });
  });
}

template <class T, int Size>
GATEDRNN_DEVICE void load_input(const Team<Size>& team, const TilePlan& p, const Task& t,
                                const ScanArgs& a, typename T::Value* tile) {
  read_map<T>(team, p, t, a.dtype, a.x, a.x_strides, 0, true, INFINITY, tile);
}

// Gates under their norm, of direction d. Without g, one plane of ones.
template <class T, int Size>
GATEDRNN_DEVICE void load_gate(const Team<Size>& team, const TilePlan& p, const Task& t,
                               const ScanArgs& a, int64_t d, typename T::Value* tile) {
  using A = typename T::Value;
  if (a.g == nullptr) {
    for (int i = team.rank; i < T::kPlane; i += Size) tile[i] = A(1);
    return;
  }
  const A limit = a.gate_norm == GateNorm::kClamp ? A(1) : A(INFINITY);
  read_map<T>(team, p, t, a.dtype, a.g, a.g_strides, a.gate_directions ? d : 0, a.gate_channels,
              limit, tile);
  if (a.gate_norm == GateNorm::kNone || a.gate_norm == GateNorm::kClamp) return;
  // Every thread meets again what it has written.
  walk_box<T, 1>(
      team, box_of<T::kSide>(t, a.gate_channels ? t.channels : 1, a.g_strides),
      [](int64_t, int) { return false; },
      [&](int64_t, int cell, bool) {
        tile[cell] = gate_norm_of<ScalarMath<A>>(a.gate_norm, tile[cell]);
      });
}

// Those of a pass, by a whole block: into one tile, or into one for each axis where they differ.
template <class T>
GATEDRNN_DEVICE void load_gates(const TilePlan& p, const Task& t, const ScanArgs& a,
                                const Pair<typename T::Value>& tiles) {
#pragma unroll 1
  for (int axis = 0; axis < (a.gate_directions ? kAxes : 1); ++axis) {
    const int d = p.direction[t.pass][axis];
    if (!a.gate_directions || d >= 0) load_gate<T>(whole_block<T>(), p, t, a, d, tiles[axis]);
  }
}

}  // namespace gatedrnn::cuda
