// Memory between guards, and what happens when a kernel touches one.
#pragma once

#include <signal.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <optional>
#include <vector>

namespace gatedrnn::emulation {

// `bytes` right before a guard that faults; with the address sanitizer, exact at both ends. Less
// than 16 bytes may lie between (the start is aligned as CUDA aligns it), and up to a page before:
// these are checked for writes when the block ends.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  char* data() const { return data_; }
  // Where it was overrun, in words; or null.
  const char* overrun() const;
  // Of an address in the memory, in the guards or between, from the start of the memory.
  std::optional<ptrdiff_t> offset(const void* address) const {
    const char* at = static_cast<const char*>(address);
    if (at >= memory_ && at < memory_ + pages_ + 2 * kGuard) return at - data_;
    return std::nullopt;
  }

  // Whether bytes are the memory's; and of those that are, whether all have been written.
  bool holds(ptrdiff_t offset, size_t bytes) const {
    return offset >= 0 && static_cast<size_t>(offset) + bytes <= bytes_;
  }
  void write(ptrdiff_t offset, size_t bytes) {
    for (; bytes > kTogether; offset += kTogether, bytes -= kTogether) write(offset, kTogether);
    const uint32_t bits = written_at(offset) | bits_of(offset, bytes);
    std::memcpy(&written_[static_cast<size_t>(offset) / 8], &bits, sizeof(bits));
  }
  bool is_written(ptrdiff_t offset, size_t bytes) const {  // of a number
    return (~written_at(offset) & bits_of(offset, bytes)) == 0;
  }

 private:
  static constexpr size_t kGuard = 1 << 20;  // wide, for strides are; only addresses, no memory
  static constexpr size_t kTogether = 16;    // bytes whose bits lie in a word that begins at any

  static uint32_t bits_of(ptrdiff_t offset, size_t bytes) {
    return ((1u << bytes) - 1) << offset % 8;
  }
  uint32_t written_at(ptrdiff_t offset) const {
    uint32_t bits;
    std::memcpy(&bits, &written_[static_cast<size_t>(offset) / 8], sizeof(bits));
    return bits;
  }

  size_t bytes_, pages_;
  char *memory_, *data_;          // a guard, pages_ bytes whose last are the memory, a guard
  std::vector<uint8_t> written_;  // a bit for each byte
};

// While it lives, a fault calls handle(signal, address, code), which would continue at `code`; if
// that returns, the fault is the process's end.
class FaultHandler {
 public:
  using Handle = void (*)(int, const void*, const void*);
  explicit FaultHandler(Handle handle);
  ~FaultHandler();

 private:
  static constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};
  struct sigaction before_[std::size(kSignals)];
  stack_t stack_;
};

}  // namespace gatedrnn::emulation
