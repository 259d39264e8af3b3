// The slabs of scratch memory, one for each thread.
#include "cpu/arena.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

namespace gatedrnn {
namespace {

constexpr size_t kAlign = Cutter::kAlign;
constexpr size_t kKept = 8 << 20;  // bytes that a thread keeps from call to call

struct Slab {
  std::unique_ptr<char[]> memory;
  size_t bytes = 0;
};
thread_local Slab slab;

bool poisoned() {
  // GATEDRNN_POISON_SCRATCH=1 fills scratch memory with NaN: the tests run so.
  static const bool poison = std::getenv("GATEDRNN_POISON_SCRATCH") != nullptr;
  return poison;
}

}  // namespace

char* Arena::slab_of(size_t bytes) {
  if (bytes > slab.bytes) {
    slab = {};  // first, so that the old and the new one are never held together
    slab.memory.reset(new (std::nothrow) char[bytes + kAlign]);
    if (!slab.memory)
      throw std::runtime_error("gatedrnn: out of memory: cannot allocate " + std::to_string(bytes) +
                               " bytes for a thread's scratch memory");
    slab.bytes = bytes;
  }
  char* const memory = slab.memory.get();
  char* const begin = memory + (kAlign - reinterpret_cast<uintptr_t>(memory) % kAlign) % kAlign;
  if (poisoned()) std::memset(begin, 0xff, bytes);  // NaN in every floating-point type
  return begin;
}

Arena::~Arena() {
  if (slab.bytes > kKept) slab = {};
}

}  // namespace gatedrnn
