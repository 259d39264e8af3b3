// Merging the maps of several directions.
#pragma once

#include "cuda/tile.cuh"

namespace gatedrnn::cuda {

// A maximum, and who attains it: bit d for direction d. Commutative, also for NaN.
template <class A>
struct ArgMax {
  A value;
  unsigned bits;
};
template <class A>
GATEDRNN_DEVICE ArgMax<A> arg_max(ArgMax<A> a, ArgMax<A> b) {
  const bool keep = (a.value >= b.value) | (a.value != a.value);
  const bool take = (b.value >= a.value) | (b.value != b.value);
  return {maximum_of(a.value, b.value), (keep ? a.bits : 0) | (take ? b.bits : 0)};
}

// How maps merge. Every operation commutes, so the order of two visits does not change the result.
enum class MergeOp { kSum, kMax, kMaxWithArgMax };
GATEDRNN_INLINE MergeOp merge_op(const ScanArgs& a) {
  return !is_maximum(a.merge) ? MergeOp::kSum : a.mask ? MergeOp::kMaxWithArgMax : MergeOp::kMax;
}
// Calls body with the operation as a constant.
template <class Body>
GATEDRNN_DEVICE void dispatch_merge_op(MergeOp op, const Body& body) {
  if (op == MergeOp::kSum)
    body.template operator()<MergeOp::kSum>();
  else if (op == MergeOp::kMax)
    body.template operator()<MergeOp::kMax>();
  else
    body.template operator()<MergeOp::kMaxWithArgMax>();
}
template <MergeOp Op, class A>
GATEDRNN_DEVICE ArgMax<A> merged(ArgMax<A> one, ArgMax<A> other) {
  if constexpr (Op == MergeOp::kMaxWithArgMax) return arg_max(one, other);
  return {Op == MergeOp::kSum ? one.value + other.value : maximum_of(one.value, other.value), 0};
}
// The factor of the final result.
template <class A>
GATEDRNN_DEVICE A merge_scale(const ScanArgs& a) {
  return merge_scale<A>(a.merge, a.directions);
}

// The tiles of both axes in a pass. If only one axis has a direction, its tile counts for both,
// which does not change a maximum.
template <class A>
struct PassMaps {
  const A *row, *column;
  bool both;
  unsigned row_bit, column_bit;
  GATEDRNN_DEVICE PassMaps(const int (&directions)[kAxes], const PerAxis<A>& h)
      : row(directions[0] >= 0 ? h[0] : h[1]),
        column(directions[1] >= 0 ? h[1] : h[0]),
        both(directions[0] >= 0 && directions[1] >= 0),
        row_bit(1u << (directions[0] >= 0 ? directions[0] : directions[1])),
        column_bit(1u << (directions[1] >= 0 ? directions[1] : directions[0])) {}
};

// Writes a tile of one direction's map, in x's dtype.
template <class T, int Size>
GATEDRNN_DEVICE void write_map(const ThreadGroup<Size>& threads, const TilePlan& p, const Task& t,
                               const ScanArgs& a, int d, const typename T::Value* h) {
  dispatch_storage<typename T::Value>(a.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    write_tile<T>(threads, t, a.y_strides,
                  static_cast<S*>(a.y) + tile_corner(p, t, a.y_strides, d, t.c0),
                  [&](int cell) { return to_storage<S>(h[cell]); });
  });
}

}  // namespace gatedrnn::cuda
