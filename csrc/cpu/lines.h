// What forward and backward share: blocks of lines, chunks of a line, packing of x and gates.
#pragma once

#include "cpu/arena.h"
#include "cpu/backward_steps.h"
#include "cpu/forward_steps.h"
#include "cpu/merge.h"

namespace gatedrnn::GATEDRNN_ISA {

// Pixels that are packed, scanned and unpacked together: their tiles stay in the L1 cache.
constexpr int64_t kChunkPixels = 16;
// A block of lines keeps its tiles from its first direction to its last where they fit in here;
// longer lines are packed anew for each direction, so that scratch memory has a bound.
constexpr int64_t kResidentBytes = 2 << 20;
// Images taken through one axis before the other: enough to feed the threads, few enough that a
// thread finds its maps in its cache.
constexpr int64_t kBatchBytes = 1 << 20;
// Registers of lanes in a block of lines. Four filled the L2 cache with tiles, one was no faster.
constexpr int kRegisters = 2;
// Channels that go through a tile together, where the weight's blocks are smaller.
constexpr int64_t kTileChannels = 16;

inline int64_t channels_per_tile(const ScanArgs& a) {
  return std::min(a.c, std::max(kTileChannels / a.block, int64_t{1}) * a.block);
}

// The batches do not change any sum's order: every direction adds its images one after the other.
inline int64_t images_per_batch(const ScanArgs& a, int64_t maps) {
  const int64_t image = std::max(maps * a.c * a.h * a.w * 4, int64_t{1});
  return std::clamp(std::max(kBatchBytes / image, thread_count()), int64_t{1},
                    std::max(a.n, int64_t{1}));
}

// A line cut into chunks, and where the chunks' tiles lie.
struct Chunks {
  int64_t count, length;
  bool resident;  // every chunk has a place of its own
  Chunks(int64_t length, int64_t bytes_per_pixel)
      : count(ceil_div(length, kChunkPixels)),
        length(length),
        resident(length * bytes_per_pixel <= kResidentBytes) {}
  int64_t begin(int64_t k) const { return k * kChunkPixels; }
  int64_t pixels(int64_t k) const { return std::min(kChunkPixels, length - begin(k)); }
  int64_t place(int64_t k) const { return resident ? begin(k) : 0; }  // in pixels of a tile
  int64_t capacity() const { return resident ? length : kChunkPixels; }
};

// The directions of one axis, by their place in the caller's list.
struct AxisDirections {
  int count = 0;
  int d[kDirections];
  AxisDirections(const ScanArgs& a, bool along_width) {
    for (int i = 0; i < a.directions; ++i)
      if (kDirectionTable[a.direction[i]].along_width == along_width) d[count++] = i;
  }
};

template <class S>
const S* at(const void* base, const Strides& s, int64_t n, int64_t d) {
  return static_cast<const S*>(base) + n * s.n + d * s.d;
}
template <class S>
S* at(void* base, const Strides& s, int64_t n, int64_t d) {
  return static_cast<S*>(base) + n * s.n + d * s.d;
}

// A block of lines of one image and the tile that x, g and the merge have in common.
template <class A, class S, int B>
struct LineBlock {
  static constexpr int kLanesPerRow = B * kLanes<A>;

  const ScanArgs& a;
  int64_t n;
  bool along_width;
  int64_t line;    // first line
  int64_t c0 = 0;  // first channel of the tile
  TileShape shape{0, 0, 0, kLanesPerRow};

  LineBlock(const ScanArgs& args, int64_t image, bool along_width, int64_t line)
      : a(args), n(image), along_width(along_width), line(line) {
    shape.l = std::min<int64_t>(kLanesPerRow, lines_of(a.h, a.w, along_width).count - line);
  }

  int64_t row() const { return kLanesPerRow; }
  int64_t pixel() const { return shape.c * kLanesPerRow; }

  // Where the map's tile of `t0` begins; channel 0 for maps without channels.
  template <class T>
  T* corner(T* map, const LineStrides& s, int64_t t0) const {
    return map + t0 * s.t + c0 * s.c + line * s.l;
  }
  // Elements to the chunk that comes after the one at t0 in the direction of the scan.
  int64_t ahead(const LineStrides& s, int64_t t0, bool reverse) const {
    const int64_t next = reverse ? t0 - kChunkPixels : t0 + kChunkPixels;
    return next < 0 || next >= lines_of(a.h, a.w, along_width).length ? 0 : (next - t0) * s.t;
  }
  template <class T, class U>
  void read(const T* map, const Strides& strides, int64_t t0, bool reverse, U* tile) const {
    const LineStrides s = line_strides(strides, along_width);
    pack(corner(map, s, t0), s, shape, tile, ahead(s, t0, reverse));
  }
  void write(const Leaving<A>& maps, A* y, uint8_t* mask, const Strides& strides, int64_t t0,
             bool reverse) const {
    const LineStrides s = line_strides(strides, along_width);
    leave(maps, corner(y, s, t0), mask ? corner(mask, s, t0) : nullptr, s, shape,
          ahead(s, t0, reverse));
  }

  // Gates: one row of ones without g; else [t][c|1][lane].
  TileShape gate_shape() const {
    TileShape s = shape;
    if (!a.gate_channels) s.c = 1;
    return s;
  }
  int64_t gate_pixel() const { return a.g ? gate_shape().c * row() : 0; }
  Map<const A> gate_tile(const A* data) const {
    return {data, gate_pixel(), a.g && a.gate_channels ? row() : 0};
  }
  template <class T>
  Map<T> tile_map(T* data) const {
    return {data, pixel(), row()};
  }

  // Whether a map of type T can be scanned where it lies: its lines side by side, none idle.
  template <class T>
  bool in_place(const Strides& strides) const {
    return std::is_same_v<T, A> && line_strides(strides, along_width).l == 1 && shape.l == row();
  }
  template <class T>
  Map<T> map_in_place(T* map, const Strides& strides, int64_t t0) const {
    const LineStrides s = line_strides(strides, along_width);
    return {corner(map, s, t0), s.t, s.c};
  }
  void fill_ones(A* gate) const {
    std::fill(gate, gate + row(), A{});
    std::fill(gate, gate + shape.l, A{1});  // idle lanes stay 0, or their state could overflow
  }
  // Their gates are 0, but 0 times an infinite bias is NaN, which the sums over lanes would meet.
  void clear_idle_lanes(A* tile, int64_t rows) const {
    if (shape.l == row()) return;
    for (A* end = tile + rows * row(); tile < end; tile += row())
      std::fill(tile + shape.l, tile + row(), A{});
  }
  // Reads g of direction d and applies its activation, but for a clamp that is left to the scan;
  // derivative, if not null, gets the derivative of that.
  void read_gate(int64_t d, int64_t t0, bool reverse, A* gate, A* derivative, bool clamp) const {
    const TileShape s = gate_shape();
    const LineStrides strides = line_strides(a.g_strides, along_width);
    const S* const map = corner(at<S>(a.g, a.g_strides, n, d), strides, t0);
    const int64_t to_next = ahead(strides, t0, reverse);
    if (clamp)
      return pack(map, strides, s, gate, to_next,
                  [](auto value) __attribute__((always_inline)) { return clamp_gate(value); });
    pack(map, strides, s, gate, to_next);
    if (!is_smooth(a.gate_activation)) return;
    const int64_t size = s.t * s.c * row();
    for (int64_t i = 0; i < size; i += kLanes<A>) {
      const Wide<A> raw = load<Wide<A>>(gate + i);
      if (derivative)
        store(derivative + i,
              gate_activation_derivative<VectorMath<Wide<A>>>(a.gate_activation, raw));
      store(gate + i, activate_gate<VectorMath<Wide<A>>>(a.gate_activation, raw));
    }
    if (s.l < row())
      for (int64_t i = 0; i < size; i += row()) std::fill(gate + i + s.l, gate + i + row(), A{});
  }
};

// The kernels for a block size; float32 knows the common sizes when it is compiled.
template <class A>
constexpr bool kKnowsSizes = sizeof(A) == 4 && GATEDRNN_VECTOR_BYTES > 16;

template <class A, int B, Also also>
auto forward_step(int64_t block) -> void (*)(const ForwardChunk<A>&) {
  if (block == 1) return forward_chunk<A, B, 1, also>;
  if constexpr (kKnowsSizes<A>) {
    if (block == 8) return forward_chunk<A, B, 8, also>;
    if (block == 16) return forward_chunk<A, B, 16, also>;
  }
  return forward_chunk<A, B, 0, also>;
}
template <class A, int B, bool Clamp>
auto backward_step(int64_t block) -> void (*)(const BackwardChunk<A>&) {
  if (block == 1) return backward_chunk<A, B, 1, Clamp>;
  if constexpr (kKnowsSizes<A>) {
    if (block == 8) return backward_chunk<A, B, 8, Clamp>;
    if (block == 16) return backward_chunk<A, B, 16, Clamp>;
  }
  return backward_chunk<A, B, 0, Clamp>;
}

// Runs body(image, first line) for every block of lines of one axis of a batch of images.
template <int Lanes, class Body>
void for_each_block(const ScanArgs& a, bool along_width, const Body& body) {
  const int64_t blocks = ceil_div(lines_of(a.h, a.w, along_width).count, Lanes);
  parallel_for(a.n * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i / blocks, i % blocks * Lanes);
  });
}

// Sums are kept in the state's type; 16-bit results are rounded once, from these, at the end.
// `map` is dense, so that its memory order does not matter here.
template <class A, class S>
void round_to_storage(const A* from, S* to, int64_t count) {
  constexpr int64_t piece = 1 << 14;
  parallel_for(ceil_div(count, piece), [&](int64_t begin, int64_t end) {
    constexpr int width = kLanes<A>;
    int64_t i = begin * piece;
    const int64_t stop = std::min(end * piece, count);
    for (; i + width <= stop; i += width) store_as<width>(to + i, load<Wide<A>>(from + i));
    for (; i < stop; ++i) {
      S last[4];
      store_as<4>(last, Vector<A, 4>{from[i]});
      to[i] = last[0];
    }
  });
}

}  // namespace gatedrnn::GATEDRNN_ISA
