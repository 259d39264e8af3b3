// Which pixels form a line: directions, strides and the cutting of an image into blocks of lines.
#pragma once

#include <algorithm>
#include <cstdint>

// For the host and for the device.
#if defined(__CUDACC__)
#define GATEDRNN_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define GATEDRNN_INLINE inline __attribute__((always_inline))
#else
#define GATEDRNN_INLINE inline
#endif

namespace gatedrnn {

// A direction is a row of this table; its code is its index, in the order of gatedrnn.DIRECTIONS.
struct Direction {
  bool along_width;  // axis scanned: W (lines are rows) or H (lines are columns)
  bool reverse;      // from the last pixel to the first
};

constexpr int kDirections = 4;
constexpr Direction kDirectionTable[kDirections] = {
    {true, false},   // left_to_right
    {true, true},    // right_to_left
    {false, false},  // top_to_bottom
    {false, true},   // bottom_to_top
};

// Element strides of a map (N, D, C, H, W); zero where the map is broadcast.
struct Strides {
  int64_t n = 0, d = 0, c = 0, h = 0, w = 0;
};

// The same map seen from one axis: t runs along a line, l counts the lines.
struct LineStrides {
  int64_t t, c, l;
};

GATEDRNN_INLINE LineStrides line_strides(const Strides& s, bool along_width) {
  return along_width ? LineStrides{s.w, s.c, s.h} : LineStrides{s.h, s.c, s.w};
}

// Sizes seen from one axis.
struct Lines {
  int64_t length;  // T: pixels of a line
  int64_t count;   // lines of an image
};

inline Lines lines_of(int64_t height, int64_t width, bool along_width) {
  return along_width ? Lines{width, height} : Lines{height, width};
}

GATEDRNN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace gatedrnn
