// The kernels' accesses of memory. Their sources are compiled for the compiler's thread sanitizer.
// These functions replace its run time, which knows no threads of a GPU.
#include <sstream>

#include "scheduler.h"

namespace gatedrnn::emulation {
namespace {

constexpr uint64_t kMostAccesses = 1'000'000;  // in a turn
// Bytes of a number. Longer accesses move packs. A pack may hold channels that do not exist:
// kernels compute with them, but do not use the results.
constexpr size_t kMostNumber = 8;

std::string kind(const Access& access) {
  return std::string(access.is_atomic ? "atomic " : "") + (access.writes ? "write" : "read");
}

}  // namespace

void Scheduler::assume_initialized(const void* begin, size_t bytes) {
  SharedMemory& shared = warp_->block->shared;
  shared.write(*shared.offset(begin), bytes);
}

std::string Scheduler::outside_shared(ptrdiff_t offset, const void* code) const {
  return "touches byte " + std::to_string(offset) + " of " + std::to_string(grid_.shared_bytes) +
         " of shared memory at " + name({.code = code});
}

void Scheduler::misaligned(const void* address, size_t alignment, const void* code) {
  if (!in_kernel_) return;
  std::ostringstream text;
  text << "touches " << address << ", which is no multiple of " << alignment << ", at "
       << name({.code = code});
  fail(text.str());
}

void Scheduler::access(const void* begin, size_t bytes, bool writes, bool is_atomic,
                       const void* code) {
  if (!in_kernel_) return;
  // A loop of plain reads that waits for another thread never switches by itself.
  if (++accesses_ > kMostAccesses) {
    accesses_ = 0;
    poll({.code = code}, 100 * kWarp);
  }
  if (!watches_ || lane().fiber->holds(begin)) return;
  SharedMemory& shared = warp_->block->shared;
  const std::optional<ptrdiff_t> offset = shared.offset(begin);
  if (offset) {
    if (!shared.holds(*offset, bytes)) fail(outside_shared(*offset, code));
    if (writes)
      shared.write(*offset, bytes);
    else if (bytes <= kMostNumber && !shared.is_written(*offset, bytes))
      fail("reads byte " + std::to_string(*offset) +
           " of shared memory, or one right behind it, which nobody has written, at " +
           name({.code = code}));
  }
  const Access now{.code = code, .thread = thread(), .writes = writes, .is_atomic = is_atomic};
  const std::optional<Access> earlier = races_.access(begin, bytes, now);
  if (!earlier) return;
  std::ostringstream text;
  text << "races: nothing orders its " << kind(now) << " at " << name({.code = code})
       << " after the " << kind(*earlier) << " at " << name({.code = earlier->code})
       << " by thread " << earlier->thread % threads() << " of block "
       << name(index(earlier->thread / threads())) << ", of ";
  if (offset)
    text << "byte " << *offset << " of shared memory";
  else
    text << "global memory";
  fail(text.str());
}

}  // namespace gatedrnn::emulation

#define GATEDRNN_ACCESS(name, bytes, alignment, writes)                                        \
  extern "C" void __tsan_##name(const void* begin) {                                           \
    gatedrnn::emulation::access(begin, bytes, alignment, writes, __builtin_return_address(0)); \
  }
#define GATEDRNN_ACCESSES(bytes, alignment)               \
  GATEDRNN_ACCESS(read##bytes, bytes, alignment, false)   \
  GATEDRNN_ACCESS(write##bytes, bytes, alignment, true)   \
  GATEDRNN_ACCESS(unaligned_read##bytes, bytes, 1, false) \
  GATEDRNN_ACCESS(unaligned_write##bytes, bytes, 1, true)
GATEDRNN_ACCESSES(1, 1)
GATEDRNN_ACCESSES(2, 2)
GATEDRNN_ACCESSES(4, 4)
GATEDRNN_ACCESSES(8, 8)
GATEDRNN_ACCESSES(16, 8)  // of two numbers, it may be

extern "C" {
void __tsan_read_range(const void* begin, size_t bytes) {
  gatedrnn::emulation::access(begin, bytes, 1, false, __builtin_return_address(0));
}
void __tsan_write_range(const void* begin, size_t bytes) {
  gatedrnn::emulation::access(begin, bytes, 1, true, __builtin_return_address(0));
}
// Of the host's code.
int __tsan_atomic32_fetch_add(int* address, int value, int) {
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}
void __tsan_vptr_update(void*, void*) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
