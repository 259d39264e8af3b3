// What forward and backward share: blocks of lines, chunks of a line, packing of x and gates.
#pragma once

#include "cpu/arena.h"
#include "cpu/steps.h"
#include "cpu/tile.h"

namespace gatedrnn::GATEDRNN_ISA {

// A tile's rows should stay in the L2 cache from packing to the last scan of it: that bounds the
// pixels of a chunk, and with it the scratch memory whatever the image's size.
constexpr int64_t kChunkBytes = 768 << 10;
// Images taken through one axis before the other: the maps should still be in the L3 cache.
constexpr int64_t kBatchBytes = 16 << 20;
// Channels that go through a tile together, where the weight's blocks are smaller.
constexpr int64_t kTileChannels = 16;

inline int64_t channels_per_tile(const ScanArgs& a) {
  return std::min(a.c, std::max(kTileChannels / a.block, int64_t{1}) * a.block);
}

// The cut depends on sizes alone, never on threads: sums have one order.
inline int64_t images_per_batch(const ScanArgs& a, int64_t maps) {
  const int64_t image = std::max(maps * a.c * a.h * a.w * 4, int64_t{1});
  return std::clamp(kBatchBytes / image, int64_t{1}, std::max(a.n, int64_t{1}));
}

// Cuts a line of `length` pixels into equal chunks of at most kChunkBytes.
struct Chunks {
  int64_t count, size, length;
  Chunks(int64_t length, int64_t bytes_per_pixel) : length(length) {
    const int64_t most = std::max(kChunkBytes / bytes_per_pixel / 8 * 8, int64_t{8});
    count = ceil_div(length, most);
    size = ceil_div(ceil_div(length, count), 8) * 8;
    count = ceil_div(length, size);
  }
  int64_t begin(int64_t k) const { return k * size; }
  int64_t pixels(int64_t k) const { return std::min(size, length - k * size); }
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
  int64_t line;  // first line
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
  template <class T, class U>
  void read(const T* map, const Strides& strides, int64_t t0, U* tile) const {
    const LineStrides s = line_strides(strides, along_width);
    pack(corner(map, s, t0), s, shape, tile);
  }
  template <class T>
  void write(const T* tile, T* map, const Strides& strides, int64_t t0) const {
    const LineStrides s = line_strides(strides, along_width);
    unpack(tile, corner(map, s, t0), s, shape);
  }

  // Gates: one row of ones without g; else [t][c|1][lane].
  TileShape gate_shape() const {
    TileShape s = shape;
    if (!a.gate_channels) s.c = 1;
    return s;
  }
  int64_t gate_pixel() const { return a.g ? gate_shape().c * row() : 0; }
  GateTile<A> gate_tile(const A* data) const {
    return {data, gate_pixel(), a.g && a.gate_channels ? row() : 0};
  }
  void fill_ones(A* gate) const {
    std::fill(gate, gate + row(), A{});
    std::fill(gate, gate + shape.l, A{1});  // idle lanes stay 0, or their state could overflow
  }
  // Reads g of direction d and applies its norm; derivative, if not null, gets the norm's.
  void read_gate(int64_t d, int64_t t0, A* gate, A* derivative) const {
    const TileShape s = gate_shape();
    const LineStrides strides = line_strides(a.g_strides, along_width);
    pack(corner(at<S>(a.g, a.g_strides, n, d), strides, t0), strides, s, gate);
    if (a.gate_norm == GateNorm::kNone) return;
    const int64_t size = s.t * s.c * row();
    for (int64_t i = 0; i < size; i += kLanes<A>) {
      const Wide<A> raw = load<Wide<A>>(gate + i);
      if (derivative) store(derivative + i, gate_norm_derivative<VectorMath<Wide<A>>>(a.gate_norm, raw));
      store(gate + i, gate_norm_of<VectorMath<Wide<A>>>(a.gate_norm, raw));
    }
    if (s.l < row())
      for (int64_t i = 0; i < size; i += row()) std::fill(gate + i + s.l, gate + i + row(), A{});
  }
};

// The kernels for a block size, with the common sizes known to the compiler.
template <class A, int B>
struct Steps {
  void (*forward)(const ForwardChunk<A>&);
  void (*backward)(const BackwardChunk<A>&);
};
template <class A, int B>
Steps<A, B> steps_for(int64_t block) {
  switch (block) {
    case 1:
      return {forward_chunk<A, B, 1>, backward_chunk<A, B, 1>};
    case 4:
      return {forward_chunk<A, B, 4>, backward_chunk<A, B, 4>};
    case 8:
      return {forward_chunk<A, B, 8>, backward_chunk<A, B, 8>};
    case 16:
      return {forward_chunk<A, B, 16>, backward_chunk<A, B, 16>};
    default:
      return {forward_chunk<A, B, 0>, backward_chunk<A, B, 0>};
  }
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
