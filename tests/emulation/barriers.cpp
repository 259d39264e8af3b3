// Barriers of a block and of a warp, and the end and the errors of a thread.
#include <bit>
#include <map>
#include <sstream>

#include "scheduler.h"

namespace gatedrnn::emulation {

void Scheduler::wait(uint32_t Warp::* mask) {
  const uint32_t self = 1u << lane_;
  warp_->ready &= ~self;
  warp_->*mask |= self;
  progress();
}

void Scheduler::progress() {
  polls_ = 0;
  if (!polled_.empty()) polled_.clear();
}

const Lane* Scheduler::lane_that_waits_for_this() const {
  for (uint32_t rest = warp_->meets_warp; rest; rest &= rest - 1) {
    const Lane& other = warp_->lanes[std::countr_zero(rest)];
    if (other.mask >> lane_ & 1) return &other;
  }
  return nullptr;
}

void Scheduler::end_thread() {
  wait(&Warp::ended);
  Block& block = *warp_->block;
  ++block.ended;
  if (block.waiting > 0)
    fail("ends while " + std::to_string(block.waiting) + " of its block wait in __syncthreads at " +
         name(block.at));
  if (const Lane* other = lane_that_waits_for_this())
    fail("ends while its warp waits for it at " + name(other->at));
  lane().fiber->finish();
}

void Scheduler::yield(const At& at) {
  lane().at = at;
  lane().fiber->suspend();
}

void Scheduler::poll(const At& at, uint32_t times) {
  polls_ += times;
  yield(at);
}

// Who reads many flags, one after the other, waits for none of them.
void Scheduler::poll_flag(const int* address, const At& at) {
  const bool is_first = polled_.emplace(thread(), address).second;
  if (is_first) polls_ = 0;
  poll(at, is_first ? 0 : 1);
}

int Scheduler::load_acquire(const int* address, const At& at) {
  poll_flag(address, at);
  access(address, sizeof(int), false, true, at.code);
  races_.acquire(thread(), address);
  return *address;
}

// Others may come between what was written before and the flag, and between the flag and what is
// written after it.
void Scheduler::store_release(int* address, int value, const At& at) {
  progress();
  yield(at);
  access(address, sizeof(int), true, true, at.code);
  races_.release(thread(), address);
  *address = value;
  progress();
  yield(at);
}

int Scheduler::add(int* address, int value, bool releases, const At& at) {
  if (value == 0) {
    poll_flag(address, at);
  } else {
    progress();
    yield(at);
  }
  access(address, sizeof(int), false, true, at.code);
  access(address, sizeof(int), true, true, at.code);
  if (releases) races_.release_too(thread(), address);
  const int before = *address;
  *address = before + value;
  return before;
}

uint32_t Scheduler::thread(const Warp& warp, int lane) {
  const auto in_block = (&warp - warp.block->warps.data()) * kWarp + lane;
  return static_cast<uint32_t>(warp.block->first_thread + static_cast<uint64_t>(in_block));
}

int Scheduler::meet_block(int vote, const At& at) {
  lane().at = at;
  Block& block = *warp_->block;
  if (block.ended > 0)
    fail_here("waits in __syncthreads, and " + std::to_string(block.ended) +
              " of its block have ended");
  if (block.waiting > 0 && !same(block.at, at))
    fail_here("waits in __syncthreads, and others of its block in that at " + name(block.at));
  if (const Lane* other = lane_that_waits_for_this())
    fail_here("waits in __syncthreads, and its warp waits for it at " + name(other->at));
  wait(&Warp::meets_block);
  block.at = at;
  block.vote |= vote != 0;
  if (++block.waiting == threads()) {
    block.result = block.vote;
    block.vote = 0, block.waiting = 0;
    std::vector<uint32_t> all;
    for (Warp& warp : block.warps) {
      warp.meets_block = 0;
      make_ready(warp, ~0u);
      for (int i = 0; i < kWarp; ++i) all.push_back(thread(warp, i));
    }
    races_.meet(all);
  }
  lane().fiber->suspend();
  return block.result;
}

uint64_t Scheduler::meet_warp(uint32_t mask, Exchange what, uint64_t value, int source,
                              const At& at) {
  Lane& self = lane();
  self.at = at;
  if (!(mask >> lane_ & 1)) fail_here("is not in the mask that it gives");
  if (mask & warp_->ended)
    fail_here("waits for lane " + std::to_string(std::countr_zero(mask & warp_->ended)) +
              ", which has ended");
  if (mask & warp_->meets_block)
    fail_here("waits for lane " + std::to_string(std::countr_zero(mask & warp_->meets_block)) +
              ", which waits in __syncthreads");
  if (!(mask >> source & 1))
    fail_here("asks for the value of lane " + std::to_string(source) +
              ", which is not in the mask");
  if (const uint32_t others = mask & warp_->meets_warp) {
    const Lane& other = warp_->lanes[std::countr_zero(others)];
    if (other.mask != mask || !same(other.at, at))
      fail_here("meets its warp with another mask or at another place than lane " +
                std::to_string(std::countr_zero(others)) + " at " + name(other.at));
  }
  self.mask = mask, self.what = what, self.value = value, self.source = source;
  wait(&Warp::meets_warp);
  if ((mask & warp_->meets_warp) == mask) {
    // The last to come hands out: a lane may come to the next meeting before another has left this.
    uint32_t votes = 0;
    std::vector<uint32_t> all;
    for (int i = 0; i < kWarp; ++i) {
      if (!(mask >> i & 1)) continue;
      if (warp_->lanes[i].value != 0) votes |= 1u << i;
      all.push_back(thread(*warp_, i));
    }
    // Shuffles and votes hand over values, and put no access of memory in order.
    if (what == Exchange::kNothing) races_.meet(all);
    for (int i = 0; i < kWarp; ++i) {
      Lane& lane = warp_->lanes[i];
      if (mask >> i & 1)
        lane.received = what == Exchange::kVotes ? votes : warp_->lanes[lane.source].value;
    }
    warp_->meets_warp &= ~mask;
    make_ready(*warp_, mask);
  }
  self.fiber->suspend();
  return self.received;
}

void Scheduler::refuse_shuffle(const char* number, int64_t value, const void* code) {
  lane().at = {.code = code};
  fail_here("shuffles with a " + std::string(number) + " of " + std::to_string(value));
}

void Scheduler::fail(const std::string& what, const char* place_word) {
  std::ostringstream text;
  text << "emulated kernel: thread " << place.thread.x << " of block " << name(place.block);
  if (lane().at.code) text << place_word << name(lane().at);
  error_ = text.str() + ": " + what;
  lane().fiber->finish();
}

void Scheduler::fault(int signal, const void* address, const void* code) {
  if (!in_kernel_) return;
  if (signal == SIGFPE) fail("divides by zero at " + name({.code = code}));
  if (signal == SIGILL || signal == SIGTRAP)
    fail("is stopped by a trap at " + name({.code = code}));
  if (lane().fiber->overflowed_at(address)) fail("its stack is full");
  if (const auto offset = warp_->block->shared.offset(address)) fail(outside_shared(*offset, code));
  std::ostringstream text;
  text << "touches memory that is not there, at " << address << ", at " << name({.code = code});
  fail(text.str());
}

std::string Scheduler::deadlock() const {
  std::map<std::string, int> waiting;
  for (const auto& block : resident_) {
    if (!block) continue;
    for (const Warp& warp : block->warps)
      for (uint32_t rest = ~warp.ended; rest; rest &= rest - 1) {
        const int i = std::countr_zero(rest);
        const char* how = warp.ready >> i & 1         ? " poll at "
                          : warp.meets_block >> i & 1 ? " wait for their block at "
                                                      : " wait for their warp at ";
        ++waiting[" of block " + name(block->index) + how + name(warp.lanes[i].at)];
      }
  }
  std::ostringstream text;
  text << "emulated kernel: deadlock, every thread waits:";
  for (const auto& [what, count] : waiting) text << "\n  " << count << what;
  return text.str();
}

}  // namespace gatedrnn::emulation
