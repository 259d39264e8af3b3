// What translated PTX (ptx.py) needs besides the emulation: the instructions that are no operators
// of C++, as the PTX ISA defines them.
#pragma once

#include <cfenv>
#include <limits>

#include "cuda_emulation.h"
#include "translation.h"

namespace gatedrnn::emulation {

// Where `count` values begin; null, whose use is reported, where a GPU could not reach them.
template <class T, int count, class Address>
T* pointer(Address address) {
  T* const values = (T*)address;
  return reinterpret_cast<uintptr_t>(values) % (sizeof(T) * count) == 0 ? values : nullptr;
}

template <class T>
T high_product(T a, T b) {
  static_assert(sizeof(T) == 4);
  return static_cast<T>(static_cast<int64_t>(a) * b >> 32);
}

// Of a division by zero a GPU says nothing; the host would end, and so for the least number by -1.
template <class T>
T quotient(T a, T b) {
  if (b == 0) return 0;
  return std::is_signed_v<T> && b == T(-1) ? -a : a / b;
}
template <class T>
T remainder(T a, T b) {
  return a - quotient(a, b) * b;
}

template <class T>
T shifted_left(T value, uint32_t bits) {
  return bits < 8 * sizeof(T) ? value << bits : 0;
}
template <class T>
T shifted_right(T value, uint32_t bits) {
  return bits < 8 * sizeof(T) ? value >> bits : value < 0 ? T(-1) : 0;
}

template <class T>
T lowest_bits(uint32_t count) {
  return static_cast<T>(~shifted_left(~T(0), count & 255));
}
// `count` bits from `begin` on.
template <class T>
T bits_of(T value, uint32_t begin, uint32_t count) {
  static_assert(std::is_unsigned_v<T>);
  return shifted_right(value, begin & 255) & lowest_bits<T>(count);
}
// `into`, whose bits there are the lowest of `bits`.
template <class T>
T bits_inserted(T bits, T into, uint32_t begin, uint32_t count) {
  const T mask = lowest_bits<T>(count);
  return (into & ~shifted_left(mask, begin & 255)) | shifted_left(bits & mask, begin & 255);
}

// Four of the eight bytes of two words. A digit of `chosen` says which, or with 8 more its sign.
inline uint32_t bytes_of(uint32_t low, uint32_t high, uint32_t chosen) {
  const uint64_t all = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = chosen >> 4 * i & 15, byte = all >> 8 * (digit & 7) & 0xff;
    result |= (digit < 8 ? byte : byte >> 7 ? 0xff : 0) << 8 * i;
  }
  return result;
}

// ---- floating point ----------------------------------------------------------------------------

template <class T>
bool either_nan(T a, T b) {
  return a != a || b != b;
}

// Of a number and NaN the number, of zeros -0 is the lesser.
template <class T>
T lesser(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    if (a == b) return std::signbit(a) ? a : b;
  return a < b || b != b ? a : b;
}
template <class T>
T greater(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    if (a == b) return std::signbit(a) ? b : a;
  return a > b || b != b ? a : b;
}

// Subnormal numbers become zero.
inline float flushed(float value) {
  return std::abs(value) < std::numeric_limits<float>::min() ? std::copysign(0.f, value) : value;
}
inline float rough_reciprocal(float value) { return flushed(1 / flushed(value)); }
// Reads and gives only the upper half.
inline double rough_reciprocal(double value) {
  constexpr uint64_t kUpper = 0xffffffff00000000;
  const double read = std::bit_cast<double>(std::bit_cast<uint64_t>(value) & kUpper);
  return std::bit_cast<double>(std::bit_cast<uint64_t>(1 / read) & kUpper);
}

template <class T>
[[gnu::noinline]] T fma_rounded_down(T a, T b, T c) {
  std::fesetround(FE_DOWNWARD);
  volatile T result = std::fma(a, b, c);
  std::fesetround(FE_TONEAREST);
  return result;
}

inline float within_0_and_1(float value) { return value > 0 ? std::min(value, 1.f) : 0; }

// A whole number as an integer, the nearest there is; NaN is 0.
template <class T, class F>
T saturated(F value) {
  if (value != value) return 0;
  if (value <= static_cast<F>(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  if (value >= static_cast<F>(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  return static_cast<T>(value);
}

// ---- threads meet ------------------------------------------------------------------------------

// shfl.sync.bfly: `clamp` has the last lane in its low bits, and above them those that lanes of one
// piece of the warp share.
inline uint32_t shuffle(uint32_t mask, uint32_t value, uint32_t flipped, uint32_t clamp,
                        bool& inside, Where where = Where::current()) {
  const int width = 32 - static_cast<int>(clamp >> 8 & 31);
  inside = (lane() ^ static_cast<int>(flipped)) <= (lane() | (width - 1));
  return __shfl_xor_sync(mask, value, static_cast<int>(flipped), width, where);
}

}  // namespace gatedrnn::emulation
