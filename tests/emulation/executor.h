// Runs a grid of threads on one thread of the CPU: what a kernel source reaches through
// cuda_emulation.h, and the rules that it is held to.
//
// Every CUDA thread is a fiber. It runs until it meets others (a barrier, a shuffle, an atomic
// access, the end), then some other is chosen at random. So an access that no barrier orders
// happens in either order, for some seed; and of a launch whose accesses are watched, it is an
// error for every seed (races.h). The environment sets, at every launch:
//   GATEDRNN_EMULATION_SEED             of all choices (0)
//   GATEDRNN_EMULATION_RESIDENT_BLOCKS  blocks that run at once (1 to 4, by the seed)
//   GATEDRNN_EMULATION_RACES            whether accesses are watched (1; never by the sanitizers)
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

namespace gatedrnn::emulation {

constexpr int kWarp = 32;

struct Size {
  unsigned x, y, z;
};

// Where the running thread is, as CUDA names it.
struct Place {
  Size thread, block, block_size, grid_size;
};
extern Place place;

struct Grid {
  Size grid, block;
  size_t shared_bytes;
  std::function<void()> thread;  // the kernel's body with its arguments
};

// Runs all threads to their end. Throws std::runtime_error at the first broken rule.
void run(const Grid& grid);

// What threads of a running grid call; `where` in the kernel's source, for messages.
using Where = std::source_location;

// Lets others run, and is no progress: when all only poll, they wait for ever.
void poll(Where where);

// Atomic, and others run between them and what comes before or after. What a thread has done before
// a release is done for who acquires the value, or what was added to it afterwards. To read again
// what has been read since anybody made progress is a poll, and so is to add zero to it.
int load_acquire(const int* address, Where where);
void store_release(int* address, int value, Where where);
int add(int* address, int value, bool releases, Where where);

// The kernel reads or writes memory, of which it says that it lies at a multiple of `alignment`,
// and continues at `code`. All accesses must be ordered.
void access(const void* begin, size_t bytes, size_t alignment, bool writes, const void* code);

// Part of this shared memory will be moved along with the rest of it, whether it was set or not.
void assume_initialized(const void* begin, size_t bytes);

// The kernel's shuffle has a number that means nothing.
[[noreturn]] void refuse_shuffle(const char* number, int64_t value);

// The kernel is about to touch what does not lie at a multiple of its size.
[[noreturn]] void misaligned(const void* address, size_t bytes);

// __syncthreads_or: all threads of the block, none of them ended, at one place in the source.
int meet_block(int vote, Where where);

enum class Exchange { kNothing, kValue, kVotes };

// All lanes of `mask`, none of them ended, at one place in the source. Returns the value of lane
// `source`, or the mask of the lanes whose value is not zero.
uint64_t meet_warp(uint32_t mask, Exchange what, uint64_t value, int source, Where where);

// The block's, between guards, each byte 0xff (a NaN) when the block starts.
char* shared_memory();

// An environment variable's number.
int64_t setting(const char* name, int64_t otherwise);

}  // namespace gatedrnn::emulation
