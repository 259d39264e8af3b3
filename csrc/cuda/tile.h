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

// A place in shared memory, for functions that are not inlined.
GATEDRNN_DEVICE int shared_offset(const void* p) {
  return static_cast<int>(static_cast<const char*>(p) - dynamic_shared_memory());
}
template <class A>
GATEDRNN_DEVICE A* shared_at(int offset) {
  return reinterpret_cast<A*>(dynamic_shared_memory() + offset);
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

// W elements of a map, moved by one instruction.
template <class S, int W>
struct alignas(sizeof(S) * W) Pack {
  S values[W];
};
template <int W, class S>
GATEDRNN_DEVICE Pack<S, W>& pack_at(S* p) {
  return *reinterpret_cast<Pack<S, W>*>(p);
}
template <int W, class S>
GATEDRNN_DEVICE const Pack<S, W>& pack_at(const S* p) {
  return *reinterpret_cast<const Pack<S, W>*>(p);
}
constexpr int kPack = 4;

// How the elements of a box are shared out, W at a time along the inner axis: a thread keeps its
// place in a plane of inner and middle axis, or takes `repeats` of them, and goes on along the
// outer axis. Inner and Middle are powers of two, so that places are found by shifts.
//
// The loads of a thread's next N packs are all under way before the first is used: it is their
// number that hides the latency of memory. Calls load(offset in memory) and use(the same, offset in
// the tile, what was loaded).
template <int Inner, int Middle, int W, int N, bool Whole, int Size, class Load, class Use>
GATEDRNN_DEVICE void walk_planes(const Team<Size>& team, const Box& box, int inner_begin,
                                 const Load& load, const Use& use) {
  constexpr int at_once = Size / Inner;  // places along middle that the threads take side by side
  constexpr int repeats = at_once < Middle ? Middle / at_once : 1;
  constexpr int step = at_once > Middle ? at_once / Middle : 1;  // along outer
  constexpr int group = repeats < N ? repeats : N;               // of repeats; N / group planes
  static_assert(Size % Inner == 0 && N % group == 0 && repeats % group == 0);
  const int a = inner_begin + team.rank % Inner, first = team.rank / Inner % Middle;
  const int64_t across = at_once * box.middle.memory;
  const int64_t onward = step * box.outer.memory - (group - 1) * across;
  if (!Whole && a >= box.inner.count) return;
#pragma unroll 1
  for (int c = team.rank / (Inner * Middle); c < box.outer.count; c += N / group * step)
#pragma unroll 1
    for (int b = first; b < first + repeats * at_once; b += group * at_once) {
      const auto inside = [&](int k) {
        return c + k / group * step < box.outer.count &&
               (Whole || b + k % group * at_once < box.middle.count);
      };
      const int64_t begin = a * W * box.inner.memory + b * box.middle.memory + c * box.outer.memory;
      const int cell = a * W * box.inner.tile + b * box.middle.tile + c * box.outer.tile;
      // Not left undefined where nothing is loaded: the register allocation would take what was
      // there before for a value, and keep a register for it all through the kernel.
      decltype(load(begin)) values[N] = {};
      int64_t at = begin;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        if (inside(k)) values[k] = load(at);
        at = sum_of(at, (k + 1) % group ? across : onward);
      }
      at = begin;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        if (inside(k))
          use(at, cell + k % group * at_once * box.middle.tile + k / group * step * box.outer.tile,
              values[k]);
        at = sum_of(at, (k + 1) % group ? across : onward);
      }
    }
}

// Calls body.operator()<W>(walk) where walk(load, use) walks a box whose corner in memory has this
// address: packs of tiles that are whole and lie well in memory, else element by element. `Packs`,
// or `Singles`, are under way at once.
template <class T, int Packs, int Singles = 2 * Packs, int Size, class S, class Body>
GATEDRNN_DEVICE void with_walk(const Team<Size>& team, const Box& box, const S* corner,
                               const Body& body) {
  constexpr int side = T::kSide, stride = tile_stride(side), plane = tile_plane(side);
  constexpr int channels = T::kChannels;
  if constexpr (side >= kPack && sizeof(S) <= 4) {
    const bool packs = box.inner.memory == 1 && box.middle.count == side &&
                       ((box.middle.memory | box.outer.memory) & (kPack - 1)) == 0 &&
                       reinterpret_cast<uintptr_t>(corner) % (kPack * sizeof(S)) == 0;
    // The steps in the tile as constants.
    if (packs && !box.channels_inside && box.inner.count == side && box.inner.tile == 1) {
      Box whole = box;
      whole.inner.memory = 1, whole.inner.tile = 1, whole.middle.tile = stride;
      whole.outer.tile = plane;
      return body.template operator()<kPack>(1, [&](const auto& load, const auto& use) {
        walk_planes<side / kPack, side, kPack, Packs, true>(team, whole, 0, load, use);
      });
    }
    if constexpr (channels >= kPack)
      if (packs && box.channels_inside && box.inner.count == channels) {
        Box whole = box;
        whole.inner.memory = 1, whole.inner.tile = plane, whole.middle.tile = 1;
        whole.outer.tile = stride;
        return body.template operator()<kPack>(plane, [&](const auto& load, const auto& use) {
          walk_planes<channels / kPack, side, kPack, Packs, true>(team, whole, 0, load, use);
        });
      }
  }
  body.template operator()<1>(0, [&](const auto& load, const auto& use) {
    constexpr int inner = side < 8 ? 8 : side;
    for (int begin = 0; begin < box.inner.count; begin += inner)
      walk_planes<inner, side, 1, Singles, false>(team, box, begin, load, use);
  });
}

// Calls use(offset in the tile) for every element, in the order of element by element.
template <class T, int Size, class Use>
GATEDRNN_DEVICE void for_each_cell(const Team<Size>& team, const Box& box, const Use& use) {
  constexpr int inner = T::kSide < 8 ? 8 : T::kSide;
  for (int begin = 0; begin < box.inner.count; begin += inner)
    walk_planes<inner, T::kSide, 1, 1, false>(
        team, box, begin, [](int64_t) { return false; },
        [&](int64_t, int cell, bool) { use(cell); });
}

// Writes value(offset in the tile) to every element of a box of a map.
template <class T, class S, int Size, class Value>
GATEDRNN_DEVICE void write_box(const Team<Size>& team, const Box& box, S* corner,
                               const Value& value) {
  with_walk<T, T::kPacks / 2>(team, box, corner, [&]<int W>(int next, const auto& walk) {
    walk([](int64_t) { return false; },
         [&](int64_t at, int cell, bool) {
           Pack<S, W> pack;
#pragma unroll
           for (int k = 0; k < W; ++k) pack.values[k] = value(cell + k * next);
           pack_at<W>(corner + at) = pack;
         });
  });
}

// A gate under tanh or sigmoid, which are long.
template <class A>
GATEDRNN_PART A smooth_gate(GateNorm norm, A gate) {
  return gate_norm_of<ScalarMath<A>>(norm, gate);
}

// Reads a tile of a map of x's dtype: x, dL/dy, or gates, which get their norm.
template <class T, int Singles = 2 * T::kPacks, int Size>
GATEDRNN_DEVICE void read_map(const Team<Size>& team, const TilePlan& p, const Task& t, Dtype dtype,
                              const void* map, const Strides& s, int64_t d, bool has_channels,
                              GateNorm norm, typename T::Value* tile) {
  using A = typename T::Value;
  const Box box = box_of<T::kSide>(t, has_channels ? t.channels : 1, s);
  const int64_t corner = tile_corner(p, t, s, d, has_channels ? t.c0 : 0);
  const A limit = norm == GateNorm::kClamp ? A(1) : A(INFINITY);
  const bool is_smooth = norm == GateNorm::kTanh || norm == GateNorm::kSigmoid;
  with_storage<A>(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const S* const from = static_cast<const S*>(map) + corner;
    with_walk<T, T::kPacks, Singles>(team, box, from, [&]<int W>(int next, const auto& walk) {
      walk([&](int64_t at) { return pack_at<W>(from + at); },
           [&](int64_t, int cell, const Pack<S, W>& pack) {
#pragma unroll
             for (int k = 0; k < W; ++k) {
               A v = to_state<A>(pack.values[k]);
               v = v > limit ? limit : v;
               tile[cell + k * next] = v < -limit ? -limit : v;  // NaN stays NaN
             }
           });
      // Apart, each by the thread that has written it: too long to be repeated for every load.
      if (is_smooth)
        walk([](int64_t) { return false; },
             [&](int64_t, int cell, bool) {
#pragma unroll 1
               for (int k = 0; k < W; ++k, cell += next) tile[cell] = smooth_gate(norm, tile[cell]);
             });
    });
  });
}

template <class T, int Size>
GATEDRNN_DEVICE void load_input(const Team<Size>& team, const TilePlan& p, const Task& t,
                                const ScanArgs& a, typename T::Value* tile) {
  read_map<T>(team, p, t, a.dtype, a.x, a.x_strides, 0, true, GateNorm::kNone, tile);
}

// Gates under their norm, of direction d. Without g, one plane of ones.
template <class T, int Size>
GATEDRNN_DEVICE void load_gate(const Team<Size>& team, const TilePlan& p, const Task& t,
                               const ScanArgs& a, int64_t d, typename T::Value* tile) {
  if (a.g)
    read_map<T, T::kGateSingles>(team, p, t, a.dtype, a.g, a.g_strides, a.gate_directions ? d : 0,
                                 a.gate_channels, a.gate_norm, tile);
  else
    for (int i = team.rank; i < T::kPlane; i += Size) tile[i] = typename T::Value(1);
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

// Asks for a tile of a map of x's dtype ahead of its being read.
template <class T, int Size>
GATEDRNN_DEVICE void ask_for_map(const Team<Size>& team, const TilePlan& p, const Task& t,
                                 Dtype dtype, const void* map, const Strides& s, int64_t d,
                                 bool has_channels) {
  constexpr int sector = 32;  // bytes, which memory gives at once
  const Box box = box_of<T::kSide>(t, has_channels ? t.channels : 1, s);
  const int element = bytes_of(dtype);
  const char* const corner =
      static_cast<const char*>(map) + tile_corner(p, t, s, d, has_channels ? t.c0 : 0) * element;
  const int line = box.inner.memory == 1 ? box.inner.count * element : 1;
  for (int i = team.rank; i < T::kSide * box.outer.count; i += Size)
    if (i % T::kSide < box.middle.count) {
      const char* const at =
          corner + (i % T::kSide * box.middle.memory + i / T::kSide * box.outer.memory) * element;
      for (int k = 0; k < line; k += sector) ask_for(at + k);
    }
}

// For all threads: x and the gates of a task to come.
template <class T>
GATEDRNN_DEVICE void ask_for_inputs(const TilePlan& p, const Task& t, const ScanArgs& a) {
  const auto team = whole_block<T>();
  ask_for_map<T>(team, p, t, a.dtype, a.x, a.x_strides, 0, true);
  if (!a.g) return;
#pragma unroll 1
  for (int axis = 0; axis < (a.gate_directions ? kAxes : 1); ++axis) {
    const int d = p.direction[t.pass][axis];
    if (!a.gate_directions || d >= 0)
      ask_for_map<T>(team, p, t, a.dtype, a.g, a.g_strides, a.gate_directions ? d : 0,
                     a.gate_channels);
  }
}

}  // namespace gatedrnn::cuda
