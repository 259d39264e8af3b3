// __half and __nv_bfloat16 as bits, and the conversions that kernels use: round to nearest even.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

struct alignas(2) __half {
  uint16_t bits;
};

struct alignas(2) __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  return std::bit_cast<float>(uint32_t{value.bits} << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (value != value) return {0x7fff};
  // Half a unit less one, and one more to an odd value: a carry may reach the exponent, rightly.
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half value) {
  const uint32_t sign = uint32_t{value.bits} << 16 & 0x80000000;
  const uint32_t rest = value.bits & 0x7fff;
  if (rest >= 0x7c00)  // infinity, NaN
    return std::bit_cast<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // As a float the exponent's bias is 112 too small, and a subnormal number is normal.
  const float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
}

inline __half __float2half_rn(float value) {
  if (value != value) return {0x7fff};
  const auto sign = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16 & 0x8000);
  const float magnitude = std::fabs(value);
  uint32_t bits;
  if (magnitude >= 65520) {  // nearer to 2^16 than to the largest number
    bits = 0x7c00;
  } else if (magnitude < 0x1p-14f) {
    // Subnormal: whole units of 2^-24, rounded by an addition whose sum has just those.
    bits = std::bit_cast<uint32_t>(magnitude + 0.5f) - std::bit_cast<uint32_t>(0.5f);
  } else {
    const uint32_t wide = std::bit_cast<uint32_t>(magnitude) - (112u << 23);
    bits = (wide + 0xfff + (wide >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | bits)};
}
