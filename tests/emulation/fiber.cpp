// The switch between stacks. ucontext's would do the same with two system calls each, and kernels
// switch at every barrier of every thread.
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves what a callee must preserve on this stack and the stack's pointer in *from, then continues
// on the stack `to` as it was left.
extern "C" void gatedrnn_switch_stack(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
.pushsection .text
.type gatedrnn_switch_stack, @function
gatedrnn_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size gatedrnn_switch_stack, . - gatedrnn_switch_stack
.popsection
)");
// Six registers, the address that `ret` takes, and a return address of zero for the entry itself,
// which ends the walk of a debugger; the stack is aligned as after a call.
constexpr size_t kFrameWords = 8, kEntryWord = 6;
#elif defined(__aarch64__)
asm(R"(
.pushsection .text
.type gatedrnn_switch_stack, %function
gatedrnn_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size gatedrnn_switch_stack, . - gatedrnn_switch_stack
.popsection
)");
constexpr size_t kFrameWords = 20, kEntryWord = 11;
#else
#error "the CUDA emulation switches stacks on x86-64 and aarch64 only"
#endif

namespace gatedrnn::emulation {
namespace {

void* scheduler_stack_pointer;
void (*entry_of_resumed)();

// The address sanitizer checks the stack in use, so every switch is announced to it.
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack;
size_t scheduler_stack_bytes;
#endif

void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  entry_of_resumed();
}

}  // namespace

Fiber::Fiber() {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  mprotect(memory_, kGuardBytes, PROT_NONE);
}

Fiber::~Fiber() { munmap(memory_, kGuardBytes + kStackBytes); }

void Fiber::start(void (*entry)()) {
  entry_ = entry;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory_ + kGuardBytes, kStackBytes);
#endif
  char* top = memory_ + kGuardBytes + kStackBytes;
  uintptr_t frame[kFrameWords] = {};
  frame[kEntryWord] = reinterpret_cast<uintptr_t>(&enter);
  stack_pointer_ = std::memcpy(top - sizeof(frame), frame, sizeof(frame));
}

void Fiber::resume() {
  entry_of_resumed = entry_;
#if defined(__SANITIZE_ADDRESS__)
  void* own_fake_stack;
  __sanitizer_start_switch_fiber(&own_fake_stack, memory_ + kGuardBytes, kStackBytes);
  gatedrnn_switch_stack(&scheduler_stack_pointer, stack_pointer_);
  __sanitizer_finish_switch_fiber(own_fake_stack, nullptr, nullptr);
#else
  gatedrnn_switch_stack(&scheduler_stack_pointer, stack_pointer_);
#endif
}

void Fiber::suspend() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_stack_, scheduler_stack, scheduler_stack_bytes);
  gatedrnn_switch_stack(&stack_pointer_, scheduler_stack_pointer);
  __sanitizer_finish_switch_fiber(fake_stack_, &scheduler_stack, &scheduler_stack_bytes);
#else
  gatedrnn_switch_stack(&stack_pointer_, scheduler_stack_pointer);
#endif
}

void Fiber::finish() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_stack_bytes);
#endif
  gatedrnn_switch_stack(&stack_pointer_, scheduler_stack_pointer);
  std::abort();  // a finished fiber was resumed
}

bool Fiber::overflowed_at(const void* address) const {
  return address >= memory_ && address < memory_ + kGuardBytes;
}

}  // namespace gatedrnn::emulation
