// The temporary memory of a call.
#pragma once

#include "cuda/runtime.h"

namespace gatedrnn::cuda {

// Hands out pieces of one allocation; without memory it only counts.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    const int64_t begin = bytes_;
    bytes_ += (count * int64_t{sizeof(T)} + kAlign - 1) / kAlign * kAlign;
    return memory_ ? reinterpret_cast<T*>(memory_ + begin) : nullptr;
  }
  int64_t bytes() const { return bytes_; }
  bool counts_only() const { return memory_ == nullptr; }

 private:
  static constexpr int64_t kAlign = 256;
  char* memory_;
  int64_t bytes_ = 0;
};

}  // namespace gatedrnn::cuda
