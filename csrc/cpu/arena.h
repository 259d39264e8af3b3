// Scratch memory of one thread: tiles are taken from a slab that is kept between calls.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace gatedrnn {

class Arena {
 public:
  Arena() : slab_(thread_slab()) {}
  ~Arena() {
    // The next call of this shape finds everything in one slab; a huge one is given back.
    if (used_ > slab_.bytes || slab_.bytes > kKept) slab_.grow(used_ <= kKept ? used_ : 0);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  template <class T>
  T* take(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    const size_t offset = used_;
    used_ += bytes;
    char* memory;
    if (used_ <= slab_.bytes) {
      memory = slab_.begin() + offset;
    } else {
      extra_.emplace_back().grow(bytes);
      memory = extra_.back().begin();
    }
    if (poisoned()) std::memset(memory, 0xff, bytes);  // NaN in every floating-point type
    return reinterpret_cast<T*>(memory);
  }

 private:
  static constexpr size_t kAlign = 64;
  static constexpr size_t kKept = 8 << 20;

  struct Slab {
    std::unique_ptr<char[]> memory;
    size_t bytes = 0;
    void grow(size_t size) {
      memory.reset();
      memory.reset(size ? new char[size + kAlign] : nullptr);
      bytes = size;
    }
    char* begin() const {
      const auto address = reinterpret_cast<uintptr_t>(memory.get());
      return memory.get() + (kAlign - address % kAlign) % kAlign;
    }
  };
  static Slab& thread_slab();
  static bool poisoned();

  Slab& slab_;
  std::vector<Slab> extra_;
  size_t used_ = 0;
};

}  // namespace gatedrnn
