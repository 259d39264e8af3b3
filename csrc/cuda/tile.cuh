// Tiles in shared memory, and how they are loaded and stored. A tile has pixels in the state's
// type, with contiguous channels.
#pragma once

#include "cuda/plan.cuh"
#include "cuda/values.cuh"

namespace gatedrnn::cuda {

// A pixel's place in the tiles of kernel_traits.cuh. Each column is followed by one unused pixel,
// and every fourth column by another. A warp then touches different banks, along a column, along a
// row, and in packs along a row.
template <int Side>
GATEDRNN_INLINE constexpr int pixel_at(int row, int column) {
  return column * (Side + 1) + column / 4 + row;
}

// Shared memory from a byte offset on.
template <class A>
GATEDRNN_DEVICE A* shared_at(int offset) {
  return reinterpret_cast<A*>(dynamic_shared_memory() + offset);
}

// Two tiles, for rows and for columns. With a step of 0 they are the same tile.
template <class A>
struct PerAxis {
  A* first;
  int step;
  GATEDRNN_DEVICE A* operator[](int axis) const { return first + axis * step; }
};

// The threads that share a copy.
template <int Size>
struct ThreadGroup {
  static constexpr int kSize = Size;
  int rank;
};
// All threads of a block with traits T.
template <class T>
GATEDRNN_DEVICE ThreadGroup<T::kThreads> whole_block() {
  return {static_cast<int>(threadIdx.x)};
}
// A barrier for all threads of a block. Everything written before it is visible after it.
template <class T>
GATEDRNN_DEVICE void block_sync() {
  if constexpr (T::kThreads == 32)
    __syncwarp();
  else
    __syncthreads();
}

// Elements from the start of a map to the tile. `c` is 0 in maps of one channel.
GATEDRNN_DEVICE int64_t tile_corner(const TilePlan& p, const Task& t, const Strides& s, int64_t d,
                                    int64_t c) {
  return t.n * s.n + d * s.d + c * s.c + int64_t{t.cell.row} * p.side * s.h +
         int64_t{t.cell.column} * p.pitch * s.w;
}

// W elements of a map or a tile, which one instruction moves.
template <class S, int W>
struct alignas(sizeof(S) * W) Pack {
  S values[W];
};
template <int W, class S>
GATEDRNN_DEVICE Pack<S, W>& pack_at(S* p) {
  return *aligned(reinterpret_cast<Pack<S, W>*>(p));
}
template <int W, class S>
GATEDRNN_DEVICE const Pack<S, W>& pack_at(const S* p) {
  return *aligned(reinterpret_cast<const Pack<S, W>*>(p));
}
constexpr int kPack = 4;
template <class S>
GATEDRNN_DEVICE bool is_aligned(const S* p) {
  return reinterpret_cast<uintptr_t>(p) % (kPack * sizeof(S)) == 0;
}

// Stores a pack to a tile in shared memory.
template <class A, int W>
GATEDRNN_DEVICE void store_pack(A* p, const Pack<A, W>& pack) {
  if constexpr (std::is_same_v<A, float> && W == 4)
    store_four(p, pack.values);
  else
    pack_at<W>(p) = pack;
}

// W values of a tile, at a distance of `next`.
template <int W, class A>
GATEDRNN_DEVICE Pack<A, W> load_cells(const A* tile, int cell, int next) {
  if (W > 1 && next == 1) return pack_at<W>(tile + cell);
  Pack<A, W> pack;
#pragma unroll
  for (int k = 0; k < W; ++k) pack.values[k] = tile[cell + k * next];
  return pack;
}
template <int W, class A>
GATEDRNN_DEVICE void store_cells(A* tile, int cell, int next, const Pack<A, W>& pack) {
  if (W > 1 && next == 1) {
    store_pack(tile + cell, pack);
    return;
  }
#pragma unroll
  for (int k = 0; k < W; ++k) tile[cell + k * next] = pack.values[k];
}

// A load for copy_vectorized that loads nothing.
struct NoOp {
  GATEDRNN_DEVICE bool operator()(int64_t) const { return false; }
};

// A thread's share of a copy: places at a distance of `across` elements in memory. The loads of the
// next N places start before the first value is used. Their number hides the latency of memory.
// Calls load(offset in memory), then use(offset in memory, cell(i), value).
template <int N, int Count, bool Whole, class Cell, class Load, class Use>
GATEDRNN_DEVICE void copy_vectorized(int64_t begin, int64_t across, int count, const Cell& cell,
                                     const Load& load, const Use& use) {
  constexpr int most = std::is_same_v<Load, NoOp> ? 2 : N, together = most < Count ? most : Count;
#pragma unroll 1
  for (int first = 0; first < Count; first += together) {
    if (!Whole && first >= count) break;
    // Zeros, although they are not used. nvcc would treat undefined values as live, and keep
    // registers for them throughout the kernel.
    decltype(load(begin)) values[together] = {};
    int64_t at = begin;
#pragma unroll
    for (int k = 0; k < together; ++k) {
      if (Whole || first + k < count) values[k] = load(at);
      at = opaque_add(at, across);
    }
    const int64_t next = at;
    at = begin;
#pragma unroll
    for (int k = 0; k < together; ++k) {
      if (Whole || first + k < count) use(at, cell(first + k), values[k]);
      at = opaque_add(at, across);
    }
    begin = next;
  }
}

// Calls body.operator()<W>(next, for_each). for_each(load, use) visits the elements of a tile in a
// map, W at a time. They are at a distance of `next` in the tile. Whole, aligned tiles move in
// packs. All others move element by element. Both run along the contiguous axis. `corner` is the
// tile's address in the map. `channels` is the number of the tile's channels in the map, or 1.
template <class T, int Size, class S, class Body>
GATEDRNN_DEVICE void dispatch_layout(const ThreadGroup<Size>& threads, const Task& t, int channels,
                                     const Strides& s, const S* corner, const Body& body) {
  constexpr int side = T::kSide, tile_channels = T::kChannels;  // channels of a tile, 0 if unknown
  if constexpr (tile_channels > 0 && sizeof(S) <= 4) {
    const bool whole = t.rows == side && t.columns == side && channels == tile_channels &&
                       s.h % kPack == 0 && is_aligned(corner);
    // Threads cover a row, or the channels of its pixels. Each thread moves down the rows.
    if (whole && s.w == 1 && s.c % kPack == 0) {
      constexpr int across = side / kPack, rows = Size / (across * tile_channels);
      static_assert(rows > 0 && Size % (across * tile_channels) == 0 && rows <= kPack);
      const int place = threads.rank % across * kPack, c = threads.rank / across % tile_channels;
      const int first = threads.rank / (across * tile_channels),
                corner_cell = T::cell(first, place, c);
      return body.template operator()<kPack>(
          (side + 1) * tile_channels, [&](const auto& load, const auto& use) {
            copy_vectorized<T::kPacksInFlight, side / rows, true>(
                place + c * s.c + first * s.h, rows * s.h, side / rows,
                [&](int i) { return T::down(corner_cell, i * rows); }, load, use);
          });
    }
    if (whole && s.c == 1 && s.w % kPack == 0) {
      constexpr int across = tile_channels / kPack, rows = Size / (across * side);
      static_assert(rows > 0 && Size % (across * side) == 0 && rows <= kPack);
      const int c = threads.rank % across * kPack, place = threads.rank / across % side;
      const int first = threads.rank / (across * side), corner_cell = T::cell(first, place, c);
      return body.template operator()<kPack>(1, [&](const auto& load, const auto& use) {
        copy_vectorized<T::kPacksInFlight, side / rows, true>(
            c + place * s.w + first * s.h, rows * s.h, side / rows,
            [&](int i) { return T::down(corner_cell, i * rows); }, load, use);
      });
    }
  }
  // Threads cover the contiguous axis first, then channels or columns.
  const bool columns_contiguous = s.h == 1 && s.w != 1,
             channels_contiguous = s.c == 1 && s.w != 1 && channels > 1;
  constexpr int depth = 8;  // threads along contiguous channels
  body.template operator()<1>(0, [&](const auto& load, const auto& use) {
    const int inner = channels_contiguous ? depth : side, outer = Size / inner;
    const int a = threads.rank % inner, b = threads.rank / inner;
#pragma unroll 1
    for (int c = channels_contiguous ? a : b; c < channels;
         c += channels_contiguous ? inner : outer)
#pragma unroll 1
      for (int i = channels_contiguous ? b : a; i < (columns_contiguous ? t.rows : t.columns);
           i += channels_contiguous ? outer : side)
        copy_vectorized<T::kSinglesInFlight, side, false>(
            c * s.c + i * (columns_contiguous ? s.h : s.w), columns_contiguous ? s.w : s.h,
            columns_contiguous ? t.columns : t.rows,
            [&](int k) { return columns_contiguous ? T::cell(i, k, c) : T::cell(k, i, c); }, load,
            use);
  });
}

// Writes value(offset in the tile) to every element of a tile in a map.
template <class T, class S, int Size, class Value>
GATEDRNN_DEVICE void write_tile(const ThreadGroup<Size>& threads, const Task& t, const Strides& s,
                                S* corner, const Value& value) {
  dispatch_layout<T>(threads, t, t.channels, s, corner, [&]<int W>(int next, const auto& for_each) {
    for_each(NoOp(), [&](int64_t at, int cell, bool) {
      Pack<S, W> pack;
#pragma unroll
      for (int k = 0; k < W; ++k) pack.values[k] = value(cell + k * next);
      pack_at<W>(corner + at) = pack;
    });
  });
}

// Applies tanh or sigmoid, which are long functions.
template <class A>
GATEDRNN_NOINLINE A activate_smooth_gate(GateActivation kind, A gate) {
  return activate_gate<ScalarMath<A>>(kind, gate);
}
template <int W, class Walk, class A>
GATEDRNN_DEVICE void apply_gate_activation(const Walk& for_each, GateActivation kind, int next,
                                           A* tile) {
  for_each(NoOp(), [&](int64_t, int cell, bool) {
#pragma unroll 1
    for (int k = 0; k < W; ++k, cell += next) tile[cell] = activate_smooth_gate(kind, tile[cell]);
  });
}

// Copies a pixel's gate from the first channel to all others.
template <class T>
GATEDRNN_DEVICE void broadcast_gate(typename T::Value* tile, int cell) {
  const typename T::Value gate = tile[cell];
#pragma unroll
  for (int c = 1; c < T::kChannels; ++c) tile[T::other_channel(cell, c)] = gate;
}

// Loads a tile of a map in x's dtype: x, dL/dy, or gates, which are activated.
template <class T, int Size>
GATEDRNN_DEVICE void read_map(const ThreadGroup<Size>& threads, const TilePlan& p, const Task& t,
                              Dtype dtype, const void* map, const Strides& s, int64_t d,
                              bool has_channels, GateActivation kind, typename T::Value* tile) {
  using A = typename T::Value;
  const int64_t corner = tile_corner(p, t, s, d, has_channels ? t.c0 : 0);
  const A limit = kind == GateActivation::kClamp ? A(1) : A(INFINITY);
  dispatch_storage<A>(dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const S* const from = static_cast<const S*>(map) + corner;
    const int channels = has_channels ? t.channels : 1;
    dispatch_layout<T>(threads, t, channels, s, from, [&]<int W>(int next, const auto& for_each) {
      for_each([&](int64_t at) { return pack_at<W>(from + at); },
               [&](int64_t, int cell, const Pack<S, W>& pack) {
                 Pack<A, W> values;
#pragma unroll
                 for (int k = 0; k < W; ++k)
                   values.values[k] = within(to_state<A>(pack.values[k]), limit);
                 store_cells(tile, cell, next, values);
               });
      // A separate loop. Each value is changed by the thread that stored it.
      if (is_smooth(kind)) apply_gate_activation<W>(for_each, kind, next, tile);
      if constexpr (W == 1 && T::kBroadcastsGates) {
        if (!has_channels)
          for_each(NoOp(), [&](int64_t, int cell, bool) { broadcast_gate<T>(tile, cell); });
      }
    });
  });
}

// Size of a tile of gates: with a gate for each channel, or one for all of them.
template <class T>
GATEDRNN_INLINE int gate_size(const TilePlan& p, const ScanArgs& a) {
  return T::kPixels * (T::kBroadcastsGates || a.gate_channels ? p.channels : 1);
}

// Loads the activated gates of direction d. Without g they are one.
template <class T, int Size>
GATEDRNN_DEVICE void load_gate(const ThreadGroup<Size>& threads, const TilePlan& p, const Task& t,
                               const ScanArgs& a, int64_t d, typename T::Value* tile) {
  if (a.g)
    read_map<T>(threads, p, t, a.dtype, a.g, a.g_strides, a.gate_directions ? d : 0,
                a.gate_channels, a.gate_activation, tile);
  else
    for (int i = threads.rank; i < gate_size<T>(p, a); i += Size) tile[i] = typename T::Value(1);
}

// Whether one loop can load both maps.
GATEDRNN_DEVICE bool same_layout(const Strides& a, const Strides& b) {
  return a.c == b.c && a.h == b.h && a.w == b.w;
}

// Loads x and the gates: into one tile of gates, or one for each axis if they differ.
template <class T, int Size>
GATEDRNN_DEVICE void load_inputs(const ThreadGroup<Size>& threads, const TilePlan& p, const Task& t,
                                 const ScanArgs& a, const int (&directions)[kAxes],
                                 typename T::Value* x, const PerAxis<typename T::Value>& g) {
  using A = typename T::Value;
  // Maps with the same layout are loaded together: twice as many loads are in flight.
  if (T::kChannels > 0 && a.g && a.gate_channels && !a.gate_directions &&
      same_layout(a.x_strides, a.g_strides)) {
    const A limit = a.gate_activation == GateActivation::kClamp ? A(1) : A(INFINITY);
    A* const gates = g[0];
    bool done = false;
    dispatch_storage<A>(a.dtype, [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      const S* const x_from = static_cast<const S*>(a.x) + tile_corner(p, t, a.x_strides, 0, t.c0);
      const S* const g_from = static_cast<const S*>(a.g) + tile_corner(p, t, a.g_strides, 0, t.c0);
      if (is_aligned(x_from) != is_aligned(g_from)) return;
      done = true;
      dispatch_layout<T>(
          threads, t, t.channels, a.x_strides, x_from, [&]<int W>(int next, const auto& for_each) {
            struct Both {
              Pack<S, W> x, g;
            };
            for_each(
                [&](int64_t at) { return Both{pack_at<W>(x_from + at), pack_at<W>(g_from + at)}; },
                [&](int64_t, int cell, const Both& both) {
                  Pack<A, W> values, bounded;
#pragma unroll
                  for (int k = 0; k < W; ++k) {
                    values.values[k] = to_state<A>(both.x.values[k]);
                    bounded.values[k] = within(to_state<A>(both.g.values[k]), limit);
                  }
                  store_cells(x, cell, next, values);
                  store_cells(gates, cell, next, bounded);
                });
            if (is_smooth(a.gate_activation))
              apply_gate_activation<W>(for_each, a.gate_activation, next, gates);
          });
    });
    if (done) return;
  }
  read_map<T>(threads, p, t, a.dtype, a.x, a.x_strides, 0, true, GateActivation::kNone, x);
#pragma unroll 1
  for (int axis = 0; axis < (a.gate_directions ? kAxes : 1); ++axis) {
    const int d = directions[axis];
    if (!a.gate_directions || d >= 0) load_gate<T>(threads, p, t, a, d, g[axis]);
  }
}

// Prefetches a tile of a map in x's dtype into L2.
template <class T, int Size>
GATEDRNN_DEVICE void prefetch_map(const ThreadGroup<Size>& threads, const TilePlan& p,
                                  const Task& t, Dtype dtype, const void* map, const Strides& s,
                                  int64_t d, bool has_channels) {
  constexpr int sector = 32;  // bytes of one memory access
  const bool channels_contiguous = s.c == 1 && s.w != 1 && has_channels;
  if (s.w != 1 && !channels_contiguous) return;
  const int element = bytes_of(dtype), channels = has_channels ? t.channels : 1;
  const char* const corner =
      static_cast<const char*>(map) + tile_corner(p, t, s, d, has_channels ? t.c0 : 0) * element;
  const int line = (channels_contiguous ? channels : t.columns) * element;
  const int64_t across = channels_contiguous ? s.w : s.c;
#pragma unroll 1
  for (int i = threads.rank; i < T::kSide * (channels_contiguous ? t.columns : channels); i += Size)
    if (const int row = i % T::kSide; row < t.rows) {
      const char* const at = corner + (row * s.h + i / T::kSide * across) * element;
      for (int k = 0; k < line; k += sector) prefetch_l2(at + k);
    }
}

// For all threads: prefetches x and the gates of a later task.
template <class T>
GATEDRNN_DEVICE void prefetch_inputs(const TilePlan& p, const Task& t, const ScanArgs& a) {
  const auto threads = whole_block<T>();
  prefetch_map<T>(threads, p, t, a.dtype, a.x, a.x_strides, 0, true);
  if (!a.g) return;
#pragma unroll 1
  for (int axis = 0; axis < (a.gate_directions ? kAxes : 1); ++axis) {
    const int d = p.direction[t.pass][axis];
    if (!a.gate_directions || d >= 0)
      prefetch_map<T>(threads, p, t, a.dtype, a.g, a.g_strides, a.gate_directions ? d : 0,
                      a.gate_channels);
  }
}

}  // namespace gatedrnn::cuda
