// The scheduler and the meeting points of threads.
//
// A warp is what is chosen, and gets a random number of turns: so that warps and blocks run in step
// or far ahead of each other. In a turn its lanes run in some order; sometimes only a few of them
// get all these turns.
#include "executor.h"

#include <bit>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "guards.h"

namespace gatedrnn::emulation {
namespace {

struct Block;

struct Lane {
  Fiber* fiber = nullptr;
  Where where;
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
  Block(Size at, size_t warp_count, size_t shared_bytes) : index(at), shared(shared_bytes) {
    warps.resize(warp_count);
    for (Warp& warp : warps) warp.block = this;
  }
  Size index;
  std::vector<Warp> warps;
  SharedMemory shared;
  size_t waiting = 0, ended = 0;  // threads
  Where where;                    // of those who wait
  int vote = 0, result = 0;
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15 + 0x632be59bd9b4e019) {
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

std::string name(Size at) {
  std::ostringstream text;
  text << '(' << at.x << ", " << at.y << ", " << at.z << ')';
  return text.str();
}

std::string name(Where where) {
  const std::string file = where.file_name();
  std::ostringstream text;
  text << file.substr(file.rfind('/') + 1) << ':' << where.line() << " in "
       << where.function_name();
  return text.str();
}

class Scheduler {
 public:
  explicit Scheduler(const Grid& grid);
  void run();

  void yield(bool polls, Where where);
  int meet_block(int vote, Where where);
  uint64_t meet_warp(uint32_t mask, Exchange what, uint64_t value, int source, Where where);
  char* shared_memory() { return warp_->block->shared.data(); }
  // Ends the launch: kernels have no exceptions.
  [[noreturn]] void fail(const std::string& what);
  std::string fault(const void* address) const;
  bool in_kernel() const { return in_kernel_; }

 private:
  static void enter();
  size_t threads() const { return size_t{grid_.block.x}; }
  Lane& lane() { return warp_->lanes[lane_]; }
  void start_block();
  void end_block(Block* block);
  uint32_t random_lanes();
  void run_turn(Warp* warp, uint32_t lanes);
  void make_ready(Warp& warp, uint32_t lanes);
  void wait(uint32_t Warp::* mask);
  void end_thread();
  std::string deadlock() const;

  const Grid grid_;
  Random random_;
  size_t most_resident_;
  uint64_t blocks_, started_ = 0;
  std::vector<std::unique_ptr<Block>> resident_;
  std::vector<Warp*> ready_;
  uint64_t polls_ = 0;  // since anything else happened
  std::string error_;

  Warp* warp_ = nullptr;  // who runs
  int lane_ = 0;
  bool in_kernel_ = false;
};

Scheduler* scheduler;  // of the launch under way

// Stacks outlive a launch: making one costs more than most kernels.
Fiber* fiber(size_t index) {
  static std::vector<std::unique_ptr<Fiber>> pool;
  while (pool.size() <= index) pool.push_back(std::make_unique<Fiber>());
  return pool[index].get();
}

void check_shape(const Grid& grid) {
  const auto [block, size] = std::pair{grid.block, grid.grid};
  if (block.y != 1 || block.z != 1 || block.x == 0 || block.x > 1024 || block.x % kWarp != 0)
    throw std::runtime_error("emulated launch: the block must be of 32 to 1024 threads in x, in " +
                             std::string("whole warps, got ") + name(block));
  if (size.x == 0 || size.y == 0 || size.z == 0 || size.x > 0x7fffffff || size.y > 0xffff ||
      size.z > 0xffff)
    throw std::runtime_error("emulated launch: the grid is empty or too large, got " + name(size));
}

// Launches of different shapes see different choices for one seed, and the same on every run.
uint64_t seed_of(const Grid& grid) {
  uint64_t seed = static_cast<uint64_t>(setting("GATEDRNN_EMULATION_SEED", 0));
  for (uint64_t part : {uint64_t{grid.grid.x}, uint64_t{grid.grid.y}, uint64_t{grid.grid.z},
                        uint64_t{grid.block.x}, uint64_t{grid.shared_bytes}})
    seed = (seed ^ part) * 0x100000001b3;
  return seed;
}

Scheduler::Scheduler(const Grid& grid)
    : grid_(grid),
      random_(seed_of(grid)),
      blocks_(uint64_t{grid.grid.x} * grid.grid.y * grid.grid.z) {
  const size_t drawn = 1 + random_.below(4);
  most_resident_ = static_cast<size_t>(
      setting("GATEDRNN_EMULATION_RESIDENT_BLOCKS", static_cast<int64_t>(drawn)));
  place.grid_size = grid.grid, place.block_size = grid.block;
}

// Blocks start in the order of their index, as on the device.
void Scheduler::start_block() {
  const uint64_t i = started_++;
  const Size& n = grid_.grid;
  const Size index{static_cast<unsigned>(i % n.x), static_cast<unsigned>(i / n.x % n.y),
                   static_cast<unsigned>(i / n.x / n.y)};
  size_t slot = 0;  // the first that no resident block holds
  while (slot < resident_.size() && resident_[slot]) ++slot;
  if (slot == resident_.size()) resident_.emplace_back();
  resident_[slot] = std::make_unique<Block>(index, threads() / kWarp, grid_.shared_bytes);
  size_t thread = slot * threads();
  for (Warp& warp : resident_[slot]->warps) {
    for (Lane& lane : warp.lanes) {
      lane.fiber = fiber(thread++);
      lane.fiber->start(&Scheduler::enter);
    }
    make_ready(warp, ~0u);
  }
}

void Scheduler::end_block(Block* block) {
  if (const char* where = block->shared.overrun())
    error_ = "emulated kernel: block " + name(block->index) + " wrote " + where + " of its " +
             std::to_string(grid_.shared_bytes) + " bytes of shared memory";
  for (auto& slot : resident_)
    if (slot.get() == block) slot.reset();
}

void Scheduler::run() {
  size_t live = 0;
  while (live > 0 || started_ < blocks_) {
    for (; live < most_resident_ && started_ < blocks_; ++live) start_block();
    // Enough for every waiting warp to have been chosen many times.
    const bool polled_out = polls_ > 2000 * kWarp * (ready_.size() + 1);
    if (ready_.empty() || polled_out) throw std::runtime_error(deadlock());
    const size_t chosen = random_.below(ready_.size());
    Warp* warp = ready_[chosen];
    const uint32_t lanes = random_lanes(), most = 1u << random_.below(10);
    for (uint32_t turns = random_.below(most) + 1; turns > 0 && warp->ready & lanes; --turns) {
      run_turn(warp, lanes);
      if (polls_ > 0 || !error_.empty()) break;
    }
    if (!warp->ready) {
      warp->listed = false;
      ready_[chosen] = ready_.back();
      ready_.pop_back();
    }
    if (error_.empty() && warp->block->ended == threads()) end_block(warp->block), --live;
    if (!error_.empty()) throw std::runtime_error(error_);
  }
}

uint32_t Scheduler::random_lanes() {
  switch (random_.below(8)) {
    case 0:
      return random_.bits();
    case 1:
      return random_.bits() & random_.bits() & random_.bits();
    default:
      return ~0u;
  }
}

// A start and an odd stride give both orders of any two lanes, for less than a shuffle.
void Scheduler::run_turn(Warp* warp, uint32_t lanes) {
  const uint32_t start = random_.below(32), stride = random_.below(32) | 1;
  const uint32_t turn = warp->ready & lanes;
  warp_ = warp;
  place.block = warp->block->index;
  const auto first = static_cast<unsigned>(warp - warp->block->warps.data()) * kWarp;
  for (uint32_t i = 0; i < kWarp; ++i) {
    lane_ = static_cast<int>((start + i * stride) & 31);
    if (!(turn >> lane_ & 1)) continue;
    place.thread.x = first + static_cast<unsigned>(lane_);
    in_kernel_ = true;
    lane().fiber->resume();
    in_kernel_ = false;
    if (!error_.empty()) return;
  }
}

void Scheduler::make_ready(Warp& warp, uint32_t lanes) {
  warp.ready |= lanes;
  if (!warp.listed) ready_.push_back(&warp);
  warp.listed = true;
}

void Scheduler::wait(uint32_t Warp::* mask) {
  const uint32_t self = 1u << lane_;
  warp_->ready &= ~self;
  warp_->*mask |= self;
  polls_ = 0;
}

void Scheduler::enter() {
  scheduler->grid_.thread();
  scheduler->end_thread();
}

void Scheduler::end_thread() {
  wait(&Warp::ended);
  Block& block = *warp_->block;
  ++block.ended;
  if (block.waiting > 0)
    fail("ends while " + std::to_string(block.waiting) + " of its block wait in __syncthreads at " +
         name(block.where));
  for (uint32_t rest = warp_->meets_warp; rest; rest &= rest - 1) {
    const Lane& other = warp_->lanes[std::countr_zero(rest)];
    if (other.mask >> lane_ & 1) fail("ends while its warp waits for it at " + name(other.where));
  }
  lane().fiber->finish();
}

void Scheduler::yield(bool polls, Where where) {
  lane().where = where;
  polls_ = polls ? polls_ + 1 : 0;
  lane().fiber->suspend();
}

int Scheduler::meet_block(int vote, Where where) {
  lane().where = where;
  Block& block = *warp_->block;
  if (block.ended > 0)
    fail("waits in __syncthreads, and " + std::to_string(block.ended) + " of its block have ended");
  if (block.waiting > 0 && block.where.line() != where.line())
    fail("waits in __syncthreads, and others of its block in that at " + name(block.where));
  for (uint32_t rest = warp_->meets_warp; rest; rest &= rest - 1) {
    const Lane& other = warp_->lanes[std::countr_zero(rest)];
    if (other.mask >> lane_ & 1)
      fail("waits in __syncthreads, and its warp waits for it at " + name(other.where));
  }
  wait(&Warp::meets_block);
  block.where = where;
  block.vote |= vote != 0;
  if (++block.waiting == threads()) {
    block.result = block.vote;
    block.vote = 0, block.waiting = 0;
    for (Warp& warp : block.warps) {
      warp.meets_block = 0;
      make_ready(warp, ~0u);
    }
  }
  lane().fiber->suspend();
  return block.result;
}

uint64_t Scheduler::meet_warp(uint32_t mask, Exchange what, uint64_t value, int source,
                              Where where) {
  Lane& self = lane();
  self.where = where;
  if (!(mask >> lane_ & 1)) fail("is not in the mask that it gives");
  if (mask & warp_->ended)
    fail("waits for lane " + std::to_string(std::countr_zero(mask & warp_->ended)) +
         ", which has ended");
  if (mask & warp_->meets_block)
    fail("waits for lane " + std::to_string(std::countr_zero(mask & warp_->meets_block)) +
         ", which waits in __syncthreads");
  if (!(mask >> source & 1))
    fail("asks for the value of lane " + std::to_string(source) + ", which is not in the mask");
  if (const uint32_t others = mask & warp_->meets_warp) {
    const Lane& other = warp_->lanes[std::countr_zero(others)];
    if (other.mask != mask || other.where.line() != where.line())
      fail("meets its warp with another mask or at another place than lane " +
           std::to_string(std::countr_zero(others)) + " at " + name(other.where));
  }
  self.mask = mask, self.what = what, self.value = value, self.source = source;
  wait(&Warp::meets_warp);
  if ((mask & warp_->meets_warp) == mask) {
    // The last to come hands out: a lane may come to the next meeting before another has left this.
    uint32_t votes = 0;
    for (int i = 0; i < kWarp; ++i)
      if (mask >> i & 1 && warp_->lanes[i].value != 0) votes |= 1u << i;
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

void Scheduler::fail(const std::string& what) {
  std::ostringstream text;
  text << "emulated kernel: thread " << place.thread.x << " of block " << name(place.block);
  if (lane().where.line() != 0) text << " at " << name(lane().where);
  error_ = text.str() + ": " + what;
  lane().fiber->finish();
}

std::string Scheduler::fault(const void* address) const {
  const Warp& warp = *warp_;
  if (warp.lanes[lane_].fiber->overflowed_at(address)) return "its stack is full";
  std::ostringstream text;
  if (const auto offset = warp.block->shared.offset_in_guards(address))
    text << "touches byte " << *offset << " of " << grid_.shared_bytes << " of shared memory";
  else
    text << "touches memory that is not there, at " << address;
  return text.str() + ", after the place named";
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
        ++waiting[" of block " + name(block->index) + how + name(warp.lanes[i].where)];
      }
  }
  std::ostringstream text;
  text << "emulated kernel: deadlock, every thread waits:";
  for (const auto& [what, count] : waiting) text << "\n  " << count << what;
  return text.str();
}

}  // namespace

Place place;

void run(const Grid& grid) {
  check_shape(grid);
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  Scheduler launch(grid);
  scheduler = &launch;
  const FaultHandler handler([](const void* address) {
    if (!scheduler->in_kernel()) return;
    scheduler->fail(scheduler->fault(address));
  });
  launch.run();
}

void yield(bool polls, Where where) { scheduler->yield(polls, where); }
int meet_block(int vote, Where where) { return scheduler->meet_block(vote, where); }
uint64_t meet_warp(uint32_t mask, Exchange what, uint64_t value, int source, Where where) {
  return scheduler->meet_warp(mask, what, value, source, where);
}
char* shared_memory() { return scheduler->shared_memory(); }

int64_t setting(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atoll(text) : otherwise;
}

}  // namespace gatedrnn::emulation
