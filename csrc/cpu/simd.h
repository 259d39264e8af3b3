// SIMD values on the compiler's vector extension: lanes, loads, conversions, exp, transposes.
//
// Included once by each scan_<isa>.cpp, inside that file's target options and namespace, so that
// every function here is compiled for one instruction set and no symbol is shared between them.
#pragma once

#include "recurrence.h"

namespace gatedrnn::GATEDRNN_ISA {

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
  // In memory: aligned to the element. An unaligned load costs nothing where it is aligned.
  typedef T stored __attribute__((vector_size(N * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <class T, int N>
using Vector = typename VectorOf<T, N>::type;

template <class V>
using Element = std::remove_cvref_t<decltype(std::declval<V&>()[0])>;
template <class V>
constexpr int kSize = sizeof(V) / sizeof(Element<V>);
// The integer vector of the same shape, as comparisons yield it.
template <class V>
using Mask = Vector<std::conditional_t<sizeof(Element<V>) == 8, int64_t, int32_t>, kSize<V>>;

// Lanes of the widest register, and the side of the square blocks that are transposed.
template <class T>
constexpr int kLanes = GATEDRNN_VECTOR_BYTES / sizeof(T);
template <class T>
constexpr int kTile = kLanes<T> < 8 ? kLanes<T> : 8;
// Lanes copied at once where a tile's row is contiguous in memory: never more than a row has.
template <class T>
constexpr int kCopy = sizeof(T) == 1 ? kLanes<float> : kLanes<T>;

template <class T>
using Wide = Vector<T, kLanes<T>>;

template <class V>
GATEDRNN_INLINE V load(const void* p) {
  return *static_cast<const typename VectorOf<Element<V>, kSize<V>>::stored*>(p);
}
template <class V>
GATEDRNN_INLINE void store(void* p, V v) {
  *static_cast<typename VectorOf<Element<V>, kSize<V>>::stored*>(p) = v;
}
template <class V, class T>
GATEDRNN_INLINE V splat(T value) {
  return value - V{};  // a broadcast: x - 0 keeps the sign of zero
}
template <class V>
GATEDRNN_INLINE V select(Mask<V> condition, V a, V b) {
  return condition ? a : b;
}

// Asks for memory that will be wanted `ahead` elements from p: the scans touch one or two cache
// lines in each of many rows, which no hardware prefetcher follows.
template <bool Write, class T>
GATEDRNN_INLINE void prefetch(T* p, int64_t ahead) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + ahead * int64_t{sizeof(T)}, Write, 2);
}

// ---- storage types -----------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <int N>
GATEDRNN_INLINE Vector<float, N> widen_half(Vector<uint32_t, N> bits) {
  typedef Vector<float, N> F;
  typedef Vector<uint32_t, N> U;
  // Shift the half's exponent and mantissa into place and rebias by a multiplication, which also
  // makes subnormals exact; infinity and NaN get the full exponent afterwards.
  const U magnitude = (bits & 0x7fff) << 13;
  const F scaled = (F)magnitude * 0x1p112f;
  const U special = (U)(magnitude >= (U{} + (0x7c00u << 13)));
  const U result = ((U)scaled | (special & 0x7f800000u)) | ((bits & 0x8000) << 16);
  return (F)result;
}

// load_as<A, N>(p): N stored values as the state's type.
template <class A, int N>
GATEDRNN_INLINE Vector<A, N> load_as(const A* p) {
  return load<Vector<A, N>>(p);
}
template <class A, int N>
GATEDRNN_INLINE Vector<A, N> load_as(const BFloat16* p) {
  const auto bits = __builtin_convertvector(load<Vector<uint16_t, N>>(p), Vector<uint32_t, N>);
  return (Vector<A, N>)(bits << 16);
}
template <class A, int N>
GATEDRNN_INLINE Vector<A, N> load_as(const Float16* p) {
  return widen_half<N>(__builtin_convertvector(load<Vector<uint16_t, N>>(p), Vector<uint32_t, N>));
}

template <int N>
GATEDRNN_INLINE void store_as(BFloat16* p, Vector<float, N> v) {
  typedef Vector<uint32_t, N> U;
  const U bits = (U)v;
  const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even
  const U result = v != v ? (bits >> 16) | 0x40 : rounded;
  store(p, __builtin_convertvector(result, Vector<uint16_t, N>));
}
template <int N>
GATEDRNN_INLINE void store_as(Float16* p, Vector<float, N> v) {
  typedef Vector<uint32_t, N> U;
  typedef Vector<float, N> F;
  const U bits = (U)v, magnitude = bits & 0x7fffffff;
  // Rebias the exponent and round to nearest even; from 65520 on that is infinity.
  const U normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14 adding 0.5 leaves the subnormal's digits at the end of the mantissa, rounded.
  const U small = (U)((F)magnitude + 0.5f) - 0x3f000000u;
  U result = magnitude < 0x38800000u ? small : normal;
  result = magnitude >= 0x477ff000u ? U{} + 0x7c00u : result;
  result = magnitude > 0x7f800000u ? U{} + 0x7e00u : result;
  store(p, __builtin_convertvector(result | ((bits >> 16) & 0x8000), Vector<uint16_t, N>));
}

template <class A>
GATEDRNN_INLINE A value_of(A v) {
  return v;
}
template <class A>
GATEDRNN_INLINE A value_of(BFloat16 v) {
  return Vector<A, 1>((Vector<uint32_t, 1>{uint32_t(v.bits) << 16}))[0];
}
template <class A>
GATEDRNN_INLINE A value_of(Float16 v) {
  return widen_half<4>(Vector<uint32_t, 4>{v.bits, 0, 0, 0})[0];
}

// ---- elementary functions ----------------------------------------------------------------------

// exp(x) = 2^k (1 + p) with p = exp(r) - 1, |r| <= ln(2) / 2. Taylor terms up to r^13 (double) and
// r^7 (float) leave less than half an ulp of r. Arguments are cut where exp leaves the type.
template <class T>
constexpr T kExpLimit = sizeof(T) == 8 ? 708 : 87;

template <class V>
struct ScaledExp {
  V p, scale;
};
template <class V>
GATEDRNN_INLINE ScaledExp<V> scaled_exp(V x) {
  typedef Element<V> T;
  typedef Mask<V> I;
  constexpr bool is_double = sizeof(T) == 8;
  const V limit = splat<V>(kExpLimit<T>);
  const V bounded = select(x > limit, limit, select(x < -limit, -limit, x));
  constexpr T log2e = T(1.4426950408889634074);
  constexpr T ln2_high = is_double ? T(6.93147180369123816490e-01) : T(0.693359375);
  constexpr T ln2_low = is_double ? T(1.90821492927058770002e-10) : T(-2.12194440e-4);
  // Adding and subtracting 1.5 * 2^(mantissa bits) rounds to the nearest integer.
  constexpr T magic = is_double ? T(6755399441055744.0) : T(12582912.0);
  const V shifted = bounded * log2e + magic;
  const I k = (I)shifted - (I)splat<V>(magic);
  const V kf = shifted - magic;
  const V r = (bounded - kf * ln2_high) - kf * ln2_low;
  constexpr double inverse_factorial[] = {1.0,
                                          1.0 / 2,
                                          1.0 / 6,
                                          1.0 / 24,
                                          1.0 / 120,
                                          1.0 / 720,
                                          1.0 / 5040,
                                          1.0 / 40320,
                                          1.0 / 362880,
                                          1.0 / 3628800,
                                          1.0 / 39916800,
                                          1.0 / 479001600,
                                          1.0 / 6227020800};
  constexpr int terms = is_double ? 13 : 7;
  V p = splat<V>(T(inverse_factorial[terms - 1]));
#pragma GCC unroll 16
  for (int i = terms - 2; i >= 0; --i) p = p * r + T(inverse_factorial[i]);
  constexpr int mantissa = is_double ? 52 : 23;
  constexpr int exponent_bias = is_double ? 1023 : 127;
  return {p * r, (V)((k + exponent_bias) << mantissa)};
}

// tanh(x) = e / (e + 2) with e = exp(2 x) - 1, taken on |x|: e keeps its digits near 0.
template <class V>
GATEDRNN_INLINE V tanh_of(V x) {
  typedef Element<V> T;
  const V magnitude = select(x < V{}, -x, x);
  const V limit = splat<V>(T(22));  // tanh is 1 there in double too
  const ScaledExp<V> f = scaled_exp<V>(2 * select(magnitude > limit, limit, magnitude));
  const V e = f.p * f.scale + (f.scale - 1);
  const V y = e / (e + 2);
  return select(x != x, x, select(x < V{}, -y, y));
}

// 1 / (1 + e) for x >= 0 and e / (1 + e) for x < 0, with e = exp(-|x|) <= 1. Beyond exp's limit it
// is 0 and no tiny number: a gate of -inf is closed, to an infinite state too.
template <class V>
GATEDRNN_INLINE V sigmoid_of(V x) {
  typedef Element<V> T;
  const ScaledExp<V> f = scaled_exp<V>(select(x < V{}, x, -x));
  const V e = f.p * f.scale + f.scale;
  const V y = select(x < V{}, e, splat<V>(T(1))) / (1 + e);
  return select(x != x, x, select(x < splat<V>(-kExpLimit<T>), V{}, y));
}

// What recurrence.h needs of a value type.
template <class V>
struct VectorMath {
  static GATEDRNN_INLINE V constant(int value) { return splat<V>(Element<V>(value)); }
  static GATEDRNN_INLINE V select(Mask<V> condition, V a, V b) { return condition ? a : b; }
  static GATEDRNN_INLINE V tanh(V x) { return tanh_of(x); }
  static GATEDRNN_INLINE V sigmoid(V x) { return sigmoid_of(x); }
};

// ---- the clamp of gates
// --------------------------------------------------------------------------

// activate_gate for kClamp in two instructions that leave the multiply-add units alone, which
// comparisons do not. Both hand on their second operand where it is NaN.
template <class V>
GATEDRNN_INLINE V clamp_gate(V g) {
#if GATEDRNN_VECTOR_BYTES == 64
  // The masked forms with nothing masked: GCC 12 warns of its own header's plain ones.
  if constexpr (std::is_same_v<V, Wide<float>>) {
    const __m512 low = _mm512_set1_ps(-1), high = _mm512_set1_ps(1), from = (__m512)g;
    return (V)_mm512_mask_max_ps(from, 0xffff, low, _mm512_mask_min_ps(from, 0xffff, high, from));
  }
  if constexpr (std::is_same_v<V, Wide<double>>) {
    const __m512d low = _mm512_set1_pd(-1), high = _mm512_set1_pd(1), from = (__m512d)g;
    return (V)_mm512_mask_max_pd(from, 0xff, low, _mm512_mask_min_pd(from, 0xff, high, from));
  }
  if constexpr (std::is_same_v<V, Vector<float, 8>>)
    return (V)_mm256_max_ps(_mm256_set1_ps(-1), _mm256_min_ps(_mm256_set1_ps(1), (__m256)g));
#endif
  return activate_gate<VectorMath<V>>(GateActivation::kClamp, g);
}

// v where g is within [-1, 1], else 0: the derivative of the clamp.
template <class V>
GATEDRNN_INLINE V where_within(V g, V v) {
  typedef Mask<V> I;
  constexpr auto sign = Element<I>(1) << (8 * sizeof(Element<I>) - 1);
  const V magnitude = (V)((I)g & ~sign);
  return select(magnitude <= splat<V>(Element<V>(1)), v, V{});
}

// ---- the mask of winning directions ------------------------------------------------------------

// winners: {bit} where h beats old (NaN beats), held | bit where they tie, else held.
// where_bit: v where the bit is set, else 0. share_of: 1 over the number of bits set, one to four.
template <class V>
using Bytes = Vector<uint8_t, kSize<V>>;

template <class V>
GATEDRNN_INLINE Bytes<V> winners(Bytes<V> held, V h, V old, uint8_t bit) {
  const auto wins = __builtin_convertvector((old < h) | (h != h), Bytes<V>);
  const auto ties = __builtin_convertvector(h == old, Bytes<V>);
  return (wins & bit) | (~wins & (held | (ties & bit)));
}
#if GATEDRNN_VECTOR_BYTES == 64
// One byte a lane and one bit of a mask register a lane: no widening to the lanes' own size.
GATEDRNN_INLINE Bytes<Wide<float>> winners(Bytes<Wide<float>> held, Wide<float> h, Wide<float> old,
                                           uint8_t bit) {
  const __m128i bits = _mm_set1_epi8(static_cast<char>(bit));
  const __mmask16 wins = _mm512_cmp_ps_mask((__m512)old, (__m512)h, _CMP_LT_OQ) |
                         _mm512_cmp_ps_mask((__m512)h, (__m512)h, _CMP_UNORD_Q);
  const __mmask16 ties = _mm512_cmp_ps_mask((__m512)h, (__m512)old, _CMP_EQ_OQ);
  const __m128i tied = _mm_mask_mov_epi8((__m128i)held, ties, _mm_or_si128((__m128i)held, bits));
  return (Bytes<Wide<float>>)_mm_mask_mov_epi8(tied, wins, bits);
}
GATEDRNN_INLINE Wide<float> where_bit(const uint8_t* p, uint8_t bit, Wide<float> v) {
  const __m128i held = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __mmask16 set = _mm_test_epi8_mask(held, _mm_set1_epi8(static_cast<char>(bit)));
  return (Wide<float>)_mm512_maskz_mov_ps(set, (__m512)v);
}
GATEDRNN_INLINE Wide<double> where_bit(const uint8_t* p, uint8_t bit, Wide<double> v) {
  const __m128i held = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __mmask16 set = _mm_test_epi8_mask(held, _mm_set1_epi8(static_cast<char>(bit)));
  return (Wide<double>)_mm512_maskz_mov_pd(static_cast<__mmask8>(set), (__m512d)v);
}
#else
template <class V>
GATEDRNN_INLINE V where_bit(const uint8_t* p, uint8_t bit, V v) {
  typedef Mask<V> I;
  const I held = __builtin_convertvector(load<Bytes<V>>(p), I);
  return select((held & bit) != 0, v, V{});
}
#endif

template <class V>
GATEDRNN_INLINE V share_of(Bytes<V> held) {
#if GATEDRNN_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<V, Wide<float>>) {
    const __m512 shares = _mm512_setr_ps(0, 1, 1, 1.f / 2, 1, 1.f / 2, 1.f / 2, 1.f / 3, 1, 1.f / 2,
                                         1.f / 2, 1.f / 3, 1.f / 2, 1.f / 3, 1.f / 3, 1.f / 4);
    const __m512i index = _mm512_maskz_cvtepu8_epi32(0xffff, (__m128i)held);
    return (V)_mm512_maskz_permutexvar_ps(0xffff, index, shares);
  }
#endif
  const auto bits = __builtin_convertvector(held, Mask<V>);
  const Mask<V> count = (bits & 1) + ((bits >> 1) & 1) + ((bits >> 2) & 1) + ((bits >> 3) & 1);
  return 1 / __builtin_convertvector(count, V);
}

// ---- transposes --------------------------------------------------------------------------------

// Interleaves runs of S elements of a and b, within groups of G elements: the low or the high half
// of each group. With G = 16 bytes these are the unpack instructions.
template <int S, int G, bool High, class V, size_t... J>
GATEDRNN_INLINE V interleave(V a, V b, std::index_sequence<J...>) {
  constexpr int n = sizeof...(J);
  return __builtin_shufflevector(
      a, b,
      ((int(J) / G) * G + (High ? G / 2 : 0) + ((int(J) % G) / (2 * S)) * S + int(J) % S +
       ((int(J) / S) % 2 ? n : 0))...);
}

// rows[i][j] -> rows[j][i], for a square of 2, 4 or 8.
template <class V>
GATEDRNN_INLINE void transpose(V* rows) {
  constexpr int n = kSize<V>;
  using Index = std::make_index_sequence<n>;
  V t[n];
  if constexpr (n == 2) {
    t[0] = interleave<1, 2, false>(rows[0], rows[1], Index());
    t[1] = interleave<1, 2, true>(rows[0], rows[1], Index());
    rows[0] = t[0], rows[1] = t[1];
  } else if constexpr (n == 4) {
    for (int i = 0; i < 4; i += 2) {
      t[i] = interleave<1, 4, false>(rows[i], rows[i + 1], Index());
      t[i + 1] = interleave<1, 4, true>(rows[i], rows[i + 1], Index());
    }
    for (int i = 0; i < 2; ++i) {
      rows[2 * i] = interleave<2, 4, false>(t[i], t[i + 2], Index());
      rows[2 * i + 1] = interleave<2, 4, true>(t[i], t[i + 2], Index());
    }
  } else {
    static_assert(n == 8);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      t[i] = interleave<1, 4, false>(rows[i], rows[i + 1], Index());
      t[i + 1] = interleave<1, 4, true>(rows[i], rows[i + 1], Index());
    }
#pragma GCC unroll 2
    for (int half = 0; half < 8; half += 4) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        rows[half + 2 * i] = interleave<2, 4, false>(t[half + i], t[half + i + 2], Index());
        rows[half + 2 * i + 1] = interleave<2, 4, true>(t[half + i], t[half + i + 2], Index());
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[i] = interleave<4, 8, false>(rows[i], rows[i + 4], Index());
      t[i + 4] = interleave<4, 8, true>(rows[i], rows[i + 4], Index());
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) rows[i] = t[i];
  }
}

}  // namespace gatedrnn::GATEDRNN_ISA
