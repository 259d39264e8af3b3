// How tasks find each other: tickets, flags of finished tiles, and the meeting of the two passes.
//
// Blocks stay on the device and draw tickets. A task waits only for tasks with smaller tickets,
// which running blocks have drawn: there is always one that need not wait, so that none can wait
// for ever. Which block does a task has no influence on any sum.
#pragma once

#include "cuda/tile.h"

namespace gatedrnn::cuda {

// Zero before a kernel starts.
struct Flags {
  int* ticket;
  int* done;  // [pass][unit][tile]: the states that leave the tile are there
  int* left;  // [unit][tile]: what the first visit leaves for the second is there

  static int64_t count(const TilePlan& p) {
    return 1 + int64_t{p.passes + 1} * p.units * p.tiles();
  }
  static Flags at(int* memory, const TilePlan& p) {
    return {memory, memory + 1, memory + 1 + int64_t{p.passes} * p.units * p.tiles()};
  }

  GATEDRNN_DEVICE int* done_at(const TilePlan& p, const Task& t, Cell cell) const {
    return done + (int64_t{t.pass} * p.units + t.unit) * p.tiles() + p.index(cell);
  }
  GATEDRNN_DEVICE int* left_at(const TilePlan& p, const Task& t) const {
    return left + int64_t{t.unit} * p.tiles() + p.index(t.cell);
  }
};

// What stands before the tiles in shared memory.
struct TaskSlot {
  int ticket;
  Task task;
};
constexpr int kTilesBegin = 128;  // bytes
static_assert(sizeof(TaskSlot) <= kTilesBegin);
GATEDRNN_DEVICE TaskSlot& task_slot() { return *shared_at<TaskSlot>(0); }

// The next ticket for all threads of a block, drawn while the one before is worked on. One thread
// finds out which task it is.
class Tickets {
 public:
  GATEDRNN_DEVICE explicit Tickets(int* ticket) : ticket_(ticket) { draw(); }
  // decode(ticket) is the task, for which tickets below `count` stand. What is in shared memory may
  // be overwritten from here on.
  template <class Decode>
  GATEDRNN_DEVICE bool next(int count, const Decode& decode) {
    __syncthreads();
    if (threadIdx.x == 0) {
      task_slot().ticket = drawn_;
      if (drawn_ < count) task_slot().task = decode(drawn_);
      draw();
    }
    __syncthreads();
    return task_slot().ticket < count;
  }

 private:
  GATEDRNN_DEVICE void draw() {
    if (threadIdx.x == 0) drawn_ = atomicAdd(ticket_, 1);
  }
  int *ticket_, drawn_ = 0;
};

// For one thread.
GATEDRNN_DEVICE void wait_for(const int* flag, int value) {
  while (load_acquire(flag) != value) __nanosleep(20);
}

// For all threads, once they have left their tiles' states: waits for the tiles upstream of the
// directions that this pass has.
GATEDRNN_DEVICE void wait_upstream(const TilePlan& p, const Task& t, const Flags& flags,
                                   bool from_end) {
  if (threadIdx.x == 0)
    for (int axis = 0; axis < kAxes; ++axis) {
      const Cell cell = p.upstream(t.cell, axis, from_end);
      if (p.direction[t.pass][axis] >= 0 && p.inside(cell)) wait_for(flags.done_at(p, t, cell), 1);
    }
  __syncthreads();
}

// For all threads, once the tile's states are in global memory: says so.
GATEDRNN_DEVICE void finish_states(const TilePlan& p, const Task& t, const Flags& flags) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    store_release(flags.done_at(p, t, t.cell), 1);
  }
}

// For all threads: a second visit waits for what the first has left. Its ticket is the smaller one.
GATEDRNN_DEVICE void wait_first_visit(const TilePlan& p, const Task& t, const Flags& flags) {
  constexpr int waiting = 32;  // of another warp than the one that finishes states
  if (t.visit != kSecond) return;
  if (threadIdx.x == waiting) wait_for(flags.left_at(p, t), 1);
  __syncthreads();
}

// For all threads: what the first visit leaves is written.
GATEDRNN_DEVICE void finish_visit(const TilePlan& p, const Task& t, const Flags& flags) {
  if (t.visit != kFirst) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    store_release(flags.left_at(p, t), 1);
  }
}

}  // namespace gatedrnn::cuda
