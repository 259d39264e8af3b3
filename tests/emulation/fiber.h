// Fibers: functions with a stack of their own, entered and left by hand.
#pragma once

#include <cstddef>

namespace gatedrnn::emulation {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next `resume` enters `entry`, whatever the fiber was doing. What it left on its stack is
  // forgotten, not destroyed: kernels own nothing.
  void start(void (*entry)());
  void resume();   // on the scheduler's stack: until the fiber suspends itself
  void suspend();  // on the fiber: back into `resume`
  [[noreturn]] void finish();

  bool holds(const void* address) const {  // whether it lies on the stack
    const char* stack = memory_ + kGuardBytes;
    return address >= stack && address < stack + kStackBytes;
  }
  bool overflowed_at(const void* address) const;  // whether it lies in the guard below the stack

 private:
  static constexpr size_t kGuardBytes = 64 << 10;  // a whole page on every system
#if defined(__SANITIZE_ADDRESS__)  // which writes a byte for each eight, for every thread
  static constexpr size_t kStackBytes = 128 << 10;
#else  // for the long frames of translated kernels; the system gives what is used
  static constexpr size_t kStackBytes = 2 << 20;
#endif

  char* memory_;  // a guard page, then the stack
  void (*entry_)() = nullptr;
  void* stack_pointer_ = nullptr;
  void* fake_stack_ = nullptr;  // the address sanitizer's
};

}  // namespace gatedrnn::emulation
