// What the directions of one axis leave in y, and in the mask of the winning directions.
#pragma once

#include "cpu/tile.h"

namespace gatedrnn::GATEDRNN_ISA {

// The hidden maps of one chunk, on tiles, and how they join what y holds already.
template <class A>
struct Leaving {
  int count;         // of tiles, 1 or 2
  const A* tile[2];  // [t][c][lane]
  uint8_t bit[2];    // of their directions
  Merge merge;
  A scale;
  bool first;  // y and mask hold nothing yet
};

template <class V>
GATEDRNN_INLINE V join(bool max, V a, V b) {
  return max ? maximum<VectorMath<V>>(b, a) : a + b;
}

// The two tiles are joined before they are transposed, and y after: neither goes the other way.
template <bool Max, bool First, class A>
void leave_merged(const Leaving<A>& f, A* y, const LineStrides& s, const TileShape& shape,
                  int64_t ahead) {
  const A *const tile = f.tile[0], *const other = f.count == 2 ? f.tile[1] : nullptr;
  const A scale = f.scale;
  unpack<1>(
      [=](int, int64_t offset, auto width) __attribute__((always_inline)) {
        typedef Vector<A, width()> V;
        V h = load<V>(tile + offset);
        if (!Max) h *= scale;
        if (other) {
          V second = load<V>(other + offset);
          if (!Max) second *= scale;
          h = join(Max, h, second);
        }
        return h;
      },
      y, s, shape, ahead,
      [](A* to, auto h) __attribute__((always_inline)) {
        if (!First) h = join(Max, load<decltype(h)>(to), h);
        store(to, h);
      });
}

// With a mask each tile is transposed for itself: y and its bytes then lie side by side.
template <int N, bool First, class A>
void leave_masked(const Leaving<A>& f, A* y, uint8_t* mask, const LineStrides& s,
                  const TileShape& shape, int64_t ahead) {
  const A* const tile[2] = {f.tile[0], f.tile[1]};
  const uint8_t bit[2] = {f.bit[0], f.bit[1]};
  unpack<N>(
      [=](int n, int64_t offset, auto width)
          __attribute__((always_inline)) { return load<Vector<A, width()>>(tile[n] + offset); },
      y, s, shape, ahead,
      [=](A* to, auto h, auto... others) __attribute__((always_inline)) {
        typedef decltype(h) V;
        uint8_t* const bytes = mask + (to - y);
        Bytes<V> held = Bytes<V>{} + bit[0];
        if (!First) {
          const V old = load<V>(to);
          held = winners(load<Bytes<V>>(bytes), h, old, bit[0]);
          h = maximum<VectorMath<V>>(h, old);
        }
        [[maybe_unused]] const auto add = [&](V other) __attribute__((always_inline)) {
          held = winners(held, other, h, bit[1]);
          h = maximum<VectorMath<V>>(other, h);
        };
        (add(others), ...);
        store(to, h);
        store(bytes, held);
      });
}

template <class A>
void leave(const Leaving<A>& f, A* y, uint8_t* mask, const LineStrides& s, const TileShape& shape,
           int64_t ahead) {
  if (mask) {
    const auto to = f.count == 2 ? (f.first ? leave_masked<2, true, A> : leave_masked<2, false, A>)
                                 : (f.first ? leave_masked<1, true, A> : leave_masked<1, false, A>);
    to(f, y, mask, s, shape, ahead);
  } else if (is_maximum(f.merge)) {
    (f.first ? leave_merged<true, true, A> : leave_merged<true, false, A>)(f, y, s, shape, ahead);
  } else {
    (f.first ? leave_merged<false, true, A> : leave_merged<false, false, A>)(f, y, s, shape, ahead);
  }
}

}  // namespace gatedrnn::GATEDRNN_ISA
