// Merging the maps of several directions: a value, and who attains the maximum.
#pragma once

#include "cuda/tile.h"

namespace gatedrnn::cuda {

// A maximum that knows who attains it: bit d for direction d. Commutative, NaN included.
template <class A>
struct Winner {
  A value;
  unsigned bits;
};
template <class A>
GATEDRNN_DEVICE Winner<A> better(Winner<A> a, Winner<A> b) {
  const bool keep = a.value >= b.value || a.value != a.value;
  const bool take = b.value >= a.value || b.value != b.value;
  return {maximum<ScalarMath<A>>(a.value, b.value), (keep ? a.bits : 0) | (take ? b.bits : 0)};
}

// How directions are merged. Either operation commutes, so that the order in which two passes reach
// a tile cannot be told from its bits.
template <class A>
struct MergeRule {
  bool is_max;
  A scale;  // of the end result

  GATEDRNN_DEVICE explicit MergeRule(const ScanArgs& a)
      : is_max(a.merge == Merge::kMax),
        scale(a.merge == Merge::kMean ? A(1) / static_cast<A>(a.directions) : A(1)) {}
  GATEDRNN_DEVICE Winner<A> operator()(Winner<A> one, Winner<A> other) const {
    return is_max ? better(one, other) : Winner<A>{one.value + other.value, 0};
  }
  // A pass's directions at one place of a tile; -1 for none.
  GATEDRNN_DEVICE Winner<A> pass(const int (&directions)[kAxes], const Pair<A>& h, int cell) const {
    if (directions[0] < 0) return {h[1][cell], 1u << directions[1]};
    const Winner<A> rows{h[0][cell], 1u << directions[0]};
    return directions[1] < 0 ? rows : (*this)(rows, {h[1][cell], 1u << directions[1]});
  }
};

// Writes a tile of one direction's map, of x's dtype.
template <class T, int Size>
GATEDRNN_DEVICE void write_map(const Team<Size>& team, const TilePlan& p, const Task& t,
                               const ScanArgs& a, int d, const typename T::Value* h) {
  with_storage<typename T::Value>(a.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    S* const y = static_cast<S*>(a.y) + tile_corner(p, t, a.y_strides, d, t.c0);
    for_each_element<T>(team, box_of<T::kSide>(t, t.channels, a.y_strides),
                        [&](int64_t at, int cell) { y[at] = to_storage<S>(h[cell]); });
  });
}

}  // namespace gatedrnn::cuda
