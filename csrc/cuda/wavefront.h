// How tasks find each other: tickets, flags of finished tiles, and the meeting of the two passes.
//
// Blocks stay on the device and draw tickets. A task waits only for tasks with smaller tickets,
// which running blocks have drawn: there is always one that need not wait, so that none can wait
// for ever. Which block does a task has no influence on any sum.
#pragma once

#include "cuda/plan.h"

namespace gatedrnn::cuda {

// Zero before a kernel starts.
struct Flags {
  int* ticket;
  int* done;  // [pass][unit][tile]: the states that leave the tile are there
  int* meet;  // [unit][tile]: which passes have been here, see Visit

  static int64_t count(const TilePlan& p) {
    return 1 + int64_t{p.passes + 1} * p.units * p.tiles();
  }
  static Flags at(int* memory, const TilePlan& p) {
    return {memory, memory + 1, memory + 1 + int64_t{p.passes} * p.units * p.tiles()};
  }

  GATEDRNN_DEVICE int* done_at(const TilePlan& p, const Task& t, Cell cell) const {
    return done + (int64_t{t.pass} * p.units + t.unit) * p.tiles() + p.index(cell);
  }
  GATEDRNN_DEVICE int* meet_at(const TilePlan& p, const Task& t) const {
    return meet + int64_t{t.unit} * p.tiles() + p.index(t.cell);
  }
};

// For all threads: the next ticket. `slot` is in shared memory; what is there may be overwritten
// from here on.
GATEDRNN_DEVICE int draw_ticket(const Flags& flags, int* slot) {
  __syncthreads();
  if (threadIdx.x == 0) *slot = atomicAdd(flags.ticket, 1);
  __syncthreads();
  return *slot;
}

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

// Two passes leave their shares of a tile in the same place: the first writes its own, the second
// adds or compares. Either order gives the same bits, for both operations commute.
enum Visit { kOnly, kFirst, kSecond };

// For all threads, once the tile's states are in global memory: says so, and which visit this is.
GATEDRNN_DEVICE Visit finish_states(const TilePlan& p, const Task& t, const Flags& flags,
                                    bool meets, int* slot) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    store_release(flags.done_at(p, t, t.cell), 1);
    *slot = kOnly;
    if (meets) {
      int* const meet = flags.meet_at(p, t);
      *slot = atomicAdd(meet, 1) == 0 ? kFirst : kSecond;
      if (*slot == kSecond) wait_for(meet, 4);  // 1 for each visit, 2 for what the first has left
    }
  }
  __syncthreads();
  return static_cast<Visit>(*slot);
}

// For all threads: what the first visit wrote is complete.
GATEDRNN_DEVICE void finish_visit(const TilePlan& p, const Task& t, const Flags& flags,
                                  Visit visit) {
  if (visit != kFirst) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(flags.meet_at(p, t), 2);
  }
}

}  // namespace gatedrnn::cuda
