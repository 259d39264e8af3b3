// The protocol between blocks: tickets, flags of finished tiles, and the order of the two passes.
//
// Blocks are persistent and draw tickets. A task waits only for tasks with smaller tickets, which
// running blocks drew. So one block never waits, and a deadlock is impossible. Which block runs a
// task has no influence on any sum.
#pragma once

#include "cuda/tile.cuh"

namespace gatedrnn::cuda {

// All zero before a kernel starts.
struct Flags {
  int* ticket;
  int* done;  // [pass][unit][tile]: whether the carries of the tile are stored
  int* left;  // [unit][tile]: whether the result of the first visit is stored

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

// Shared memory starts with the current task, the next task, and the next ticket.
struct TaskSlot {
  int ticket;
  Task task;
};
constexpr int kTicketBegin = 2 * sizeof(TaskSlot), kTilesBegin = 144;  // bytes
static_assert(kTicketBegin + sizeof(int) <= kTilesBegin && kTilesBegin % 16 == 0);
GATEDRNN_DEVICE TaskSlot& task_slot() { return *shared_at<TaskSlot>(0); }
GATEDRNN_DEVICE TaskSlot& next_slot() { return *shared_at<TaskSlot>(sizeof(TaskSlot)); }

// Makes the next task the current one, for all threads. Returns its ticket.
template <class T>
GATEDRNN_DEVICE int take_next_slot() {
  constexpr int words = sizeof(TaskSlot) / sizeof(int);
  static_assert(words <= T::kThreads);
  int* const word = shared_at<int>(0) + threadIdx.x;
  block_sync<T>();
  if (threadIdx.x < words) *word = word[words];
  block_sync<T>();
  return task_slot().ticket;
}

// The ticket after the current task's. Every task draws one ticket, before a long operation such as
// loading a tile, and keeps it afterwards.
template <class T>
class Ticket {
 public:
  GATEDRNN_DEVICE explicit Ticket(int* next) {
    if (is_drawn_here()) drawn_ = atomicAdd(next, 1);
  }
  GATEDRNN_DEVICE void keep() const {
    if (is_drawn_here()) kept() = drawn_;
  }
  // One thread draws. If the block has several warps, it is in another warp than the threads that
  // wait.
  static GATEDRNN_DEVICE bool is_drawn_here() { return threadIdx.x == T::kThreads - 1; }
  static GATEDRNN_DEVICE int& kept() { return *shared_at<int>(kTicketBegin); }

 private:
  int drawn_ = 0;
};

// The tasks of a block. One thread prepares the next task: decode(ticket, task) sets it, for
// tickets below `count`.
template <class T, class Decode>
class Tasks {
 public:
  GATEDRNN_DEVICE Tasks(int* ticket, int count, const Decode& decode)
      : count_(count), decode_(decode) {
    Ticket<T>(ticket).keep();
    if (Ticket<T>::is_drawn_here()) assume_initialized(next_slot());  // except for its ticket
    look_ahead();
  }
  // Makes the next task the current one, for all threads. Shared memory may be overwritten from
  // here on. Returns false at the end.
  GATEDRNN_DEVICE bool next() { return take_next_slot<T>() < count_; }
  // Call this once for each task, after the next ticket is kept.
  GATEDRNN_DEVICE void look_ahead() {
    if (!Ticket<T>::is_drawn_here()) return;
    const int ticket = Ticket<T>::kept();
    next_slot().ticket = ticket;
    if (ticket < count_) decode_(ticket, next_slot().task);
  }

 private:
  int count_;
  const Decode& decode_;
};

// For all threads: loads x and the gates of the current task, and draws the next ticket.
template <class T, class Tiles>
GATEDRNN_DEVICE void load_tiles(const TilePlan& p, const ScanArgs& a, const Flags& flags,
                                const Tiles& tiles) {
  const Task t = task_slot().task;
  const Ticket<T> ticket(flags.ticket);
  load_inputs<T>(whole_block<T>(), p, t, a, p.direction[t.pass], tiles.x, tiles.g);
  ticket.keep();
}

// For one thread. With -DGATEDRNN_TRAP_HANGS, a wait of about ten seconds ends the kernel with an
// error. Otherwise it would block the GPU.
GATEDRNN_DEVICE void wait_for(const int* flag, int value) {
#if defined(GATEDRNN_TRAP_HANGS) && !defined(GATEDRNN_EMULATION)
  const long long begin = clock64();
  while (load_acquire(flag) != value) {
    __nanosleep(20);
    if (clock64() - begin > 20'000'000'000) __trap();  // at about 2 GHz
  }
#else
  while (load_acquire(flag) != value) __nanosleep(20);
#endif
}

// For all threads: waits for the previous tiles of the directions in this pass.
template <class T>
GATEDRNN_DEVICE void wait_upstream(const TilePlan& p, const Task& t, const Flags& flags,
                                   bool from_end) {
  constexpr int apart =
      T::kThreads < 32 * kAxes ? 1 : 32;  // one warp for each axis, if there are two
  if (threadIdx.x % apart == 0 && threadIdx.x / apart < kAxes) {
    const int axis = threadIdx.x / apart;
    const Cell cell = p.upstream(t.cell, axis, from_end);
    if (p.direction[t.pass][axis] >= 0 && p.inside(cell)) wait_for(flags.done_at(p, t, cell), 1);
  }
  block_sync<T>();
}

// For all threads: publishes the carries of this tile. After the barrier, one thread's release
// covers the writes of all threads.
template <class T>
GATEDRNN_DEVICE void finish_states(const TilePlan& p, const Task& t, const Flags& flags) {
  block_sync<T>();
  if (threadIdx.x == 0) store_release(flags.done_at(p, t, t.cell), 1);
}

// For all threads: a second visit waits for the first visit, which has a smaller ticket.
template <class T>
GATEDRNN_DEVICE void wait_first_visit(const TilePlan& p, const Task& t, const Flags& flags) {
  // In another warp than the thread that publishes carries, if there is one.
  constexpr int waiting = T::kThreads > 32 ? 32 : 0;
  if (t.visit != kSecond) return;
  if (threadIdx.x == waiting) wait_for(flags.left_at(p, t), 1);
  block_sync<T>();
}

// For all threads: publishes the result of a first visit.
template <class T>
GATEDRNN_DEVICE void finish_visit(const TilePlan& p, const Task& t, const Flags& flags) {
  if (t.visit != kFirst) return;
  block_sync<T>();
  if (threadIdx.x == 0) store_release(flags.left_at(p, t), 1);
}

}  // namespace gatedrnn::cuda
