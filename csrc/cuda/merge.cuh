// Merging the maps of several directions: a value, and who attains the maximum.
#pragma once

#include "cuda/tile.cuh"

namespace gatedrnn::cuda {

// A maximum that knows who attains it: bit d for direction d. Commutative, NaN included.
template <class A>
struct Winner {
  A value;
  unsigned bits;
};
template <class A>
GATEDRNN_DEVICE Winner<A> better(Winner<A> a, Winner<A> b) {
  const bool keep = (a.value >= b.value) | (a.value != a.value);
  const bool take = (b.value >= a.value) | (b.value != b.value);
  return {maximum_of(a.value, b.value), (keep ? a.bits : 0) | (take ? b.bits : 0)};
}

// How directions are merged. Either operation commutes, so that the order in which two passes reach
// a tile cannot be told from its bits.
enum class Rule { kSum, kMax, kMaxWithWinners };
GATEDRNN_INLINE Rule rule_of(const ScanArgs& a) {
  return !is_maximum(a.merge) ? Rule::kSum : a.mask ? Rule::kMaxWithWinners : Rule::kMax;
}
// Calls body with it as a constant.
template <class Body>
GATEDRNN_DEVICE void with_rule(Rule rule, const Body& body) {
  if (rule == Rule::kSum)
    body.template operator()<Rule::kSum>();
  else if (rule == Rule::kMax)
    body.template operator()<Rule::kMax>();
  else
    body.template operator()<Rule::kMaxWithWinners>();
}
template <Rule R, class A>
GATEDRNN_DEVICE Winner<A> merged(Winner<A> one, Winner<A> other) {
  if constexpr (R == Rule::kMaxWithWinners) return better(one, other);
  return {R == Rule::kSum ? one.value + other.value : maximum_of(one.value, other.value), 0};
}
// Of the end result.
template <class A>
GATEDRNN_DEVICE A merge_scale(const ScanArgs& a) {
  return merge_scale<A>(a.merge, a.directions);
}

// The tiles of a pass, those of both axes or of the one that has a direction: there it stands for
// both, which changes no maximum.
template <class A>
struct PassMaps {
  const A *one, *other;
  bool both;
  unsigned one_bit, other_bit;
  GATEDRNN_DEVICE PassMaps(const int (&directions)[kAxes], const Pair<A>& h)
      : one(directions[0] >= 0 ? h[0] : h[1]),
        other(directions[1] >= 0 ? h[1] : h[0]),
        both(directions[0] >= 0 && directions[1] >= 0),
        one_bit(1u << (directions[0] >= 0 ? directions[0] : directions[1])),
        other_bit(1u << (directions[1] >= 0 ? directions[1] : directions[0])) {}
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
