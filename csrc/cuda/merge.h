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

// How directions are merged, with or without knowing the winners. Either operation commutes, so
// that the order in which two passes reach a tile cannot be told from its bits.
template <class A, bool Winners = true>
struct MergeRule {
  bool is_max;
  GATEDRNN_DEVICE explicit MergeRule(bool is_max) : is_max(is_max) {}
  GATEDRNN_DEVICE Winner<A> operator()(Winner<A> one, Winner<A> other) const {
    if (!is_max) return {one.value + other.value, 0};
    if constexpr (Winners)
      return better(one, other);
    else
      return {maximum_of(one.value, other.value), 0};
  }
};
// Of the end result.
template <class A>
GATEDRNN_DEVICE A merge_scale(const ScanArgs& a) {
  return a.merge == Merge::kMean ? A(1) / static_cast<A>(a.directions) : A(1);
}

// The tiles of a pass, those of both axes or of the one that has a direction, as places in shared
// memory: a function that is not inlined would not know of a pointer that it points there.
template <class A>
struct PassMaps {
  int one, other;
  bool both;
  unsigned one_bit, other_bit;
  GATEDRNN_DEVICE PassMaps(const int (&directions)[kAxes], const Pair<A>& h)
      : one(shared_offset(directions[0] >= 0 ? h[0] : h[1])),
        other(shared_offset(h[1])),
        both(directions[0] >= 0 && directions[1] >= 0),
        one_bit(1u << (directions[0] >= 0 ? directions[0] : directions[1])),
        other_bit(both ? 1u << directions[1] : 0) {}
  GATEDRNN_DEVICE A at(int map, int cell) const { return shared_at<A>(map)[cell]; }
};

// Writes a tile of one direction's map, of x's dtype.
template <class T, int Size>
GATEDRNN_DEVICE void write_map(const Team<Size>& team, const TilePlan& p, const Task& t,
                               const ScanArgs& a, int d, const typename T::Value* h) {
  with_storage<typename T::Value>(a.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    write_tile<T>(team, t, a.y_strides,
                  static_cast<S*>(a.y) + tile_corner(p, t, a.y_strides, d, t.c0),
                  [&](int cell) { return to_storage<S>(h[cell]); });
  });
}

}  // namespace gatedrnn::cuda
