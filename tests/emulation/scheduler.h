// One launch: its resident blocks, which thread runs, and which threads wait for others.
#pragma once

#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "executor.h"
#include "fiber.h"
#include "guard_pages.h"
#include "races.h"

namespace gatedrnn::emulation {

struct Block;

// A place in a kernel: as its source names it, and where the code continues after it.
struct At {
  Where where = {};
  const void* code = nullptr;
};
bool same(const At& a, const At& b);
std::string name(const At& at);
std::string name(Size at);

struct Lane {
  Fiber* fiber = nullptr;
  At at;  // of its last meeting
  // Of the warp's meeting that the lane waits in, or has left last.
  uint32_t mask = 0;
  Exchange what = Exchange::kNothing;
  uint64_t value = 0;
  int source = 0;
  uint64_t received = 0;
};

// A lane is in one of the four masks.
struct Warp {
  Block* block = nullptr;
  uint32_t ready = ~0u, meets_warp = 0, meets_block = 0, ended = 0;
  bool listed = false;
  Lane lanes[kWarp];
};

struct Block {
  Block(Size at, uint64_t number, size_t warp_count, size_t shared_bytes)
      : index(at), first_thread(number * warp_count * kWarp), shared(shared_bytes) {
    warps.resize(warp_count);
    for (Warp& warp : warps) warp.block = this;
  }
  Size index;
  uint64_t first_thread;  // of the launch
  std::vector<Warp> warps;
  SharedMemory shared;
  size_t waiting = 0, ended = 0;  // threads
  At at;                          // of those who wait
  int vote = 0, result = 0;
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_((seed * 0x9e3779b97f4a7c15 + 0x632be59bd9b4e019) | 1) {
    for (int i = 0; i < 4; ++i) bits();
  }
  uint32_t bits() {  // xorshift64*
    state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
    return static_cast<uint32_t>(state_ * 0x2545f4914f6cdd1d >> 32);
  }
  uint32_t below(size_t count) { return static_cast<uint32_t>(uint64_t{bits()} * count >> 32); }

 private:
  uint64_t state_;
};

class Scheduler {
 public:
  explicit Scheduler(const Grid& grid);
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;
  void run();

  void poll(const At& at, uint32_t times = 1);
  void access(const void* begin, size_t bytes, bool writes, bool is_atomic, const void* code);
  void assume_initialized(const void* begin, size_t bytes);
  [[noreturn]] void refuse_shuffle(const char* number, int64_t value, const void* code);
  // Returns if no kernel is to blame.
  void misaligned(const void* address, size_t alignment, const void* code);
  int load_acquire(const int* address, const At& at);
  void store_release(int* address, int value, const At& at);
  int add(int* address, int value, bool releases, const At& at);
  int meet_block(int vote, const At& at);
  uint64_t meet_warp(uint32_t mask, Exchange what, uint64_t value, int source, const At& at);
  char* shared_memory() { return warp_->block->shared.data(); }
  // Ends the launch: kernels have no exceptions.
  [[noreturn]] void fail(const std::string& what, const char* place = ", last met at ");
  // What the processor refused; returns if no kernel is to blame.
  void fault(int signal, const void* address, const void* code);

 private:
  static void enter();
  size_t threads() const { return size_t{grid_.block.x}; }
  Lane& lane() { return warp_->lanes[lane_]; }
  // The running one, or another lane of its warp, by its number in the launch.
  uint32_t thread() const { return thread(*warp_, lane_); }
  static uint32_t thread(const Warp& warp, int lane);
  // What the thread is about to do breaks a rule.
  [[noreturn]] void fail_here(const std::string& what) { fail(what, " at "); }
  std::string outside_shared(ptrdiff_t offset, const void* code) const;
  Size index(uint64_t block) const;
  void start_block();
  void end_block(Block* block);
  uint32_t random_lanes();
  void run_turn(Warp* warp, uint32_t lanes);
  void make_ready(Warp& warp, uint32_t lanes);
  void progress();
  void wait(uint32_t Warp::* mask);
  void yield(const At& at);
  void poll_flag(const int* address, const At& at);
  const Lane* lane_that_waits_for_this() const;
  void end_thread();
  std::string deadlock() const;

  const Grid grid_;
  Random random_;
  size_t most_resident_;
  uint64_t blocks_, started_ = 0;
  std::vector<std::unique_ptr<Block>> resident_;
  std::vector<Warp*> ready_;
  // Since anything else happened: how often a thread has polled, and what each has read.
  uint64_t polls_ = 0;
  std::set<std::pair<uint32_t, const void*>> polled_;
  uint64_t accesses_ = 0;  // of the running thread, in this turn
  Races races_;
  const bool watches_ = setting("GATEDRNN_EMULATION_RACES", 1) != 0;
  std::string error_;

  Warp* warp_ = nullptr;  // who runs
  int lane_ = 0;
  bool in_kernel_ = false;
};

}  // namespace gatedrnn::emulation
