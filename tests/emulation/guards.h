// Memory between guards, and what happens when a kernel touches one.
#pragma once

#include <signal.h>

#include <cstddef>
#include <cstdint>
#include <optional>

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
  // Of an address in the memory, or in the guards, from the start of the memory.
  std::optional<ptrdiff_t> offset(const void* address) const;
  std::optional<ptrdiff_t> offset_in_guards(const void* address) const;

 private:
  size_t bytes_, pages_;
  char *memory_, *data_;  // a guard, pages_ bytes whose last are the memory, a guard
};

// While it lives, a fault calls `handle(address)`; if that returns, the fault is the process's end.
class FaultHandler {
 public:
  explicit FaultHandler(void (*handle)(const void*));
  ~FaultHandler();

 private:
  struct sigaction segv_, bus_;
  stack_t stack_;
};

}  // namespace gatedrnn::emulation
