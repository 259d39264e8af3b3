// Forward pass: all directions of one axis over a block of lines, merged into y; then the other.
#pragma once

#include "cpu/huge_pages.h"
#include "cpu/lines.h"

namespace gatedrnn::GATEDRNN_ISA {

// y and mask of one batch; `merged`: an earlier axis has left its merge there.
template <class A>
struct ForwardMaps {
  A* y;
  uint8_t* mask;
  bool merged;
};

// The tiles and states that the directions of a block of lines work on.
template <class A>
struct ForwardTiles {
  A *x, *gate, *waiting, *leaving, *state, *no_bias;
};

template <class A, class S, int B>
void forward_block(const ScanArgs& a, const ForwardMaps<A>& maps, bool along_width, int64_t n,
                   int64_t line) {
  LineBlock<A, S, B> block(a, n, along_width, line);
  const AxisDirections directions(a, along_width);
  const int64_t row = block.row(), length = lines_of(a.h, a.w, along_width).length;
  const int64_t most = channels_per_tile(a);
  const bool gates_differ = a.g && a.gate_directions, separate = a.merge == Merge::kNone;
  // x and g that lie right for the lanes are read where they are; the rest goes through tiles.
  const bool x_in_place = block.template in_place<S>(a.x_strides);
  const bool clamp = a.gate_activation == GateActivation::kClamp;
  const bool g_in_place = a.g && block.template in_place<S>(a.g_strides) &&
                          (a.gate_activation == GateActivation::kNone || clamp);
  const auto scan = g_in_place && clamp ? forward_step<A, B, Also::kClamp>(a.block)
                                        : forward_step<A, B, Also::kNothing>(a.block);
  const Chunks chunks(length, row * most * 3 * sizeof(A));

  const int64_t pixels = chunks.capacity(), tile = most * row;
  // The first of two directions waits for the second, where there is room; the last one leaves.
  const bool waits = chunks.resident && directions.count == 2 && !separate;
  Arena arena;
  const auto s = arena.lay_out([&](Cutter& cutter) {
    ForwardTiles<A> s{};
    if (!x_in_place) s.x = cutter.take<A>(pixels * tile);
    if (!g_in_place) s.gate = cutter.take<A>(a.g ? pixels * tile : row);
    if (waits) s.waiting = cutter.take<A>(pixels * tile);
    s.leaving = cutter.take<A>(kChunkPixels * tile);
    s.state = cutter.take<A>(tile);
    s.no_bias = cutter.take<A>(most);
    return s;
  });
  std::fill(s.no_bias, s.no_bias + most, A{});
  if (!a.g) block.fill_ones(s.gate);

  for (block.c0 = 0; block.c0 < a.c; block.c0 += most) {
    block.shape.c = std::min(most, a.c - block.c0);
    const int64_t pixel = block.pixel();
    for (int i = 0; i < directions.count; ++i) {
      const int64_t d = directions.d[i], at_channel = d * a.c + block.c0;
      const bool stays = waits && i == 0;
      const bool enter = !chunks.resident || i == 0;
      ForwardChunk<A> f{};
      f.reverse = kDirectionTable[a.direction[d]].reverse;
      f.channels = block.shape.c;
      f.block = a.block;
      f.nonlinearity = a.nonlinearity;
      f.w = static_cast<const A*>(a.weight) + at_channel * a.block;
      f.bias = a.bias ? static_cast<const A*>(a.bias) + at_channel : s.no_bias;
      f.state = s.state;
      std::fill(s.state, s.state + pixel, A{});
      Leaving<A> last{};
      last.count = waits ? 2 : 1;
      last.bit[0] = static_cast<uint8_t>(1 << directions.d[waits ? 0 : i]);
      last.bit[1] = static_cast<uint8_t>(1 << d);
      last.merge = separate ? Merge::kSum : a.merge;
      last.scale = merge_scale<A>(a.merge, a.directions);
      last.first = separate || (!maps.merged && (waits || i == 0));
      A* const y = at<A>(maps.y, a.y_strides, n, separate ? d : 0);
      uint8_t* const mask = maps.mask ? at<uint8_t>(maps.mask, a.y_strides, n, 0) : nullptr;

      for (int64_t j = 0; j < chunks.count; ++j) {
        const int64_t k = f.reverse ? chunks.count - 1 - j : j;
        const int64_t t0 = chunks.begin(k), place = chunks.place(k) * pixel;
        f.length = block.shape.t = chunks.pixels(k);

        const S* const x_map = at<S>(a.x, a.x_strides, n, 0);
        if constexpr (std::is_same_v<A, S>)
          if (x_in_place) f.x = block.map_in_place(x_map, a.x_strides, t0);
        if (!x_in_place) {
          f.x = block.template tile_map<const A>(s.x + place);
          if (enter) block.read(x_map, a.x_strides, t0, f.reverse, s.x + place);
        }
        if constexpr (std::is_same_v<A, S>)
          if (g_in_place) f.g = block.map_in_place(at<S>(a.g, a.g_strides, n, d), a.g_strides, t0);
        if (!g_in_place) {
          A* const chunk = s.gate + chunks.place(k) * block.gate_pixel();
          f.g = block.gate_tile(chunk);
          if (a.g && (enter || gates_differ))
            block.read_gate(d, t0, f.reverse, chunk, nullptr, clamp);
        }

        f.h = stays ? s.waiting + place : s.leaving;
        scan(f);
        if (stays) continue;
        last.tile[0] = waits ? s.waiting + place : s.leaving;
        last.tile[1] = s.leaving;
        block.write(last, y, mask, a.y_strides, t0, f.reverse);
      }
    }
  }
}

template <class A, class S, int B>
void forward_batch(const ScanArgs& a, ForwardMaps<A> maps) {
  for (const bool along_width : {true, false}) {
    if (AxisDirections(a, along_width).count == 0) continue;
    for_each_block<B * kLanes<A>>(a, along_width, [&](int64_t n, int64_t line) {
      forward_block<A, S, B>(a, maps, along_width, n, line);
    });
    maps.merged = true;
  }
}

template <class A, class S>
void forward(const ScanArgs& a) {
  const int64_t step = images_per_batch(a, 3);
  const int64_t image = (a.merge == Merge::kNone ? a.directions : 1) * a.c * a.h * a.w;
  ask_for_huge_pages(a.y, a.n * image * int64_t{sizeof(S)});
  constexpr bool in_place = std::is_same_v<A, S>;
  std::unique_ptr<A[]> sums(in_place ? nullptr : new A[std::min(step, a.n) * image]);
  for (int64_t n = 0; n < a.n; n += step) {
    ScanArgs batch = a;
    batch.n = std::min(step, a.n - n);
    batch.x = at<S>(a.x, a.x_strides, n, 0);
    if (a.g) batch.g = at<S>(a.g, a.g_strides, n, 0);
    S* y = at<S>(a.y, a.y_strides, n, 0);
    ForwardMaps<A> maps{nullptr, a.mask ? a.mask + n * a.y_strides.n : nullptr, false};
    if constexpr (in_place)
      maps.y = y;
    else
      maps.y = sums.get();
    forward_batch<A, S, kRegisters>(batch, maps);
    if constexpr (!in_place) round_to_storage(sums.get(), y, batch.n * image);
  }
}

}  // namespace gatedrnn::GATEDRNN_ISA
