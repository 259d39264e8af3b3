// Scratch memory of one thread: a slab that is kept between calls, cut into tiles.
//
// Only `lay_out` allocates, and throws where it cannot. What is not inlined is in arena.cpp: here
// it would be compiled for every instruction set, and the linker would keep one copy for all.
#pragma once

#include <cstddef>
#include <cstdint>

#include "geometry.h"

namespace gatedrnn {

// Cuts memory into tiles, one after the other. Without memory it only counts their bytes.
class Cutter {
 public:
  static constexpr size_t kAlign = 64;

  explicit GATEDRNN_INLINE Cutter(char* memory) : memory_(memory) {}
  template <class T>
  GATEDRNN_INLINE T* take(int64_t count) {
    char* const tile = memory_ == nullptr ? nullptr : memory_ + bytes_;
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    return reinterpret_cast<T*>(tile);
  }
  GATEDRNN_INLINE size_t bytes() const { return bytes_; }

 private:
  char* memory_;
  size_t bytes_ = 0;
};

class Arena {
 public:
  Arena() = default;
  ~Arena();  // gives back a huge slab
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // cut(Cutter&) takes all tiles and returns them. It runs twice: to count, and to take.
  template <class Cut>
  GATEDRNN_INLINE auto lay_out(const Cut& cut) {
    Cutter counting(nullptr);
    cut(counting);
    Cutter cutter(slab_of(counting.bytes()));
    return cut(cutter);
  }

 private:
  static char* slab_of(size_t bytes);
};

}  // namespace gatedrnn
