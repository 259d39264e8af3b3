#include "guard_pages.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

namespace gatedrnn::emulation {
namespace {

const auto kPage = static_cast<size_t>(sysconf(_SC_PAGESIZE));
constexpr size_t kHandlerStack = 64 << 10;
constexpr size_t kAlign = 16;
constexpr char kFill = '\xff';

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

FaultHandler::Handle handle_fault;

// Behind the instruction that is to blame, or within it.
const char* code_of(const void* context) {
  const mcontext_t& machine = static_cast<const ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  return reinterpret_cast<const char*>(machine.gregs[REG_RIP]) + 1;
#else
  return reinterpret_cast<const char*>(machine.pc) + 1;
#endif
}

// A separate stack: the fault may be a full stack of a fiber.
void on_fault(int signal, siginfo_t* info, void* context) {
  handle_fault(signal, info->si_addr, code_of(context));
  ::signal(signal, SIG_DFL);
}

}  // namespace

SharedMemory::SharedMemory(size_t bytes)
    : bytes_(bytes), pages_(round_up(bytes, kPage)), written_(bytes / 8 + sizeof(uint32_t)) {
  void* memory = mmap(nullptr, pages_ + 2 * kGuard, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  mprotect(memory_ + kGuard, pages_, PROT_READ | PROT_WRITE);
  char* end = memory_ + kGuard + pages_;
  data_ = end - round_up(bytes, kAlign);
  std::memset(memory_ + kGuard, kFill, pages_);
  ASAN_POISON_MEMORY_REGION(memory_ + kGuard, static_cast<size_t>(data_ - memory_) - kGuard);
  ASAN_POISON_MEMORY_REGION(data_ + bytes, static_cast<size_t>(end - data_) - bytes);
}

SharedMemory::~SharedMemory() {
  ASAN_UNPOISON_MEMORY_REGION(memory_ + kGuard, pages_);
  munmap(memory_, pages_ + 2 * kGuard);
}

const char* SharedMemory::overrun() const {
  const auto filled = [](char byte) { return byte == kFill; };
  const char *start = memory_ + kGuard, *end = start + pages_;
  ASAN_UNPOISON_MEMORY_REGION(start, pages_);
  if (!std::all_of(start, static_cast<const char*>(data_), filled)) return "before the start";
  if (!std::all_of(static_cast<const char*>(data_ + bytes_), end, filled)) return "past the end";
  return nullptr;
}

FaultHandler::FaultHandler(Handle handle) {
  static const auto memory = std::make_unique<char[]>(kHandlerStack);
  handle_fault = handle;
  stack_t stack = {};
  stack.ss_sp = memory.get(), stack.ss_size = kHandlerStack;
  sigaltstack(&stack, &stack_);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  // The handler is left by a switch of stacks, never by a return: the signal must not stay blocked.
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &before_[i]);
}

FaultHandler::~FaultHandler() {
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &before_[i], nullptr);
  sigaltstack(&stack_, nullptr);
}

}  // namespace gatedrnn::emulation
