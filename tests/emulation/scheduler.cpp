// Who runs next.
//
// A warp is what is chosen, and gets a random number of turns: so that warps and blocks run in step
// or far ahead of each other. In a turn its lanes run in some order; sometimes only a few of them
// get all these turns.
#include "scheduler.h"

#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace gatedrnn::emulation {
namespace {

// Of the launch under way on this thread: kernels' sources hold code of the host as well, and other
// threads run that meanwhile. The model is the one that costs an access nothing.
__attribute__((tls_model("initial-exec"))) thread_local Scheduler* scheduler;

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

}  // namespace

Scheduler::Scheduler(const Grid& grid)
    : grid_(grid),
      random_(seed_of(grid)),
      blocks_(uint64_t{grid.grid.x} * grid.grid.y * grid.grid.z) {
  const size_t drawn = 1 + random_.below(4);
  most_resident_ = static_cast<size_t>(
      setting("GATEDRNN_EMULATION_RESIDENT_BLOCKS", static_cast<int64_t>(drawn)));
  place.grid_size = grid.grid, place.block_size = grid.block;
  scheduler = this;
}

Scheduler::~Scheduler() { scheduler = nullptr; }

Size Scheduler::index(uint64_t block) const {
  const Size& n = grid_.grid;
  return {static_cast<unsigned>(block % n.x), static_cast<unsigned>(block / n.x % n.y),
          static_cast<unsigned>(block / n.x / n.y)};
}

// Blocks start in the order of their index, as on the device.
void Scheduler::start_block() {
  const uint64_t i = started_++;
  size_t slot = 0;  // the first that no resident block holds
  while (slot < resident_.size() && resident_[slot]) ++slot;
  if (slot == resident_.size()) resident_.emplace_back();
  resident_[slot] = std::make_unique<Block>(index(i), i, threads() / kWarp, grid_.shared_bytes);
  races_.start(threads(), resident_[slot]->shared.data(), grid_.shared_bytes);
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
  races_.end(block->first_thread, threads(), block->shared.data(), grid_.shared_bytes);
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
    in_kernel_ = true, accesses_ = 0;
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

void Scheduler::enter() {
  scheduler->grid_.thread();
  scheduler->end_thread();
}

Place place;

void run(const Grid& grid) {
  check_shape(grid);
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  Scheduler launch(grid);
  const FaultHandler handler([](int signal, const void* address, const void* code) {
    if (scheduler) scheduler->fault(signal, address, code);
  });
  launch.run();
}

int load_acquire(const int* address, Where where) {
  return scheduler->load_acquire(address, {where, __builtin_return_address(0)});
}
void store_release(int* address, int value, Where where) {
  scheduler->store_release(address, value, {where, __builtin_return_address(0)});
}
int add(int* address, int value, bool releases, Where where) {
  return scheduler->add(address, value, releases, {where, __builtin_return_address(0)});
}
void access(const void* begin, size_t bytes, size_t alignment, bool writes, const void* code) {
  const bool is_place = begin >= &place && begin < &place + 1;  // threadIdx and so on
  if (!scheduler || is_place) return;
  if ((reinterpret_cast<uintptr_t>(begin) & (alignment - 1)) != 0)
    scheduler->misaligned(begin, alignment, code);
  scheduler->access(begin, bytes, writes, false, code);
}
void assume_initialized(const void* begin, size_t bytes) {
  scheduler->assume_initialized(begin, bytes);
}
void refuse_shuffle(const char* number, int64_t value) {
  scheduler->refuse_shuffle(number, value, __builtin_return_address(0));
}
void misaligned(const void* address, size_t bytes) {
  scheduler->misaligned(address, bytes, __builtin_return_address(0));
  std::abort();  // of the host's code, which has no such accesses
}
void poll(Where where) { scheduler->poll({where, __builtin_return_address(0)}); }
int meet_block(int vote, Where where) {
  return scheduler->meet_block(vote, {where, __builtin_return_address(0)});
}
uint64_t meet_warp(uint32_t mask, Exchange what, uint64_t value, int source, Where where) {
  return scheduler->meet_warp(mask, what, value, source, {where, __builtin_return_address(0)});
}
char* shared_memory() { return scheduler->shared_memory(); }

int64_t setting(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atoll(text) : otherwise;
}

}  // namespace gatedrnn::emulation
