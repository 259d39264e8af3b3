// The parameters of a scan by chunks (chunks.cu), and its second stage, which carries states.
//
// A unit is eight channels of an image: a thread owns eight channels. For dense maps, a unit is a
// single channel instead. Each row of a tile then has eight *segments*, next to each other, which
// take the place of the eight channels. Such a unit is an eighth of the size. So more of it stays
// in the cache, and no thread is idle if there are few channels.
#pragma once

#include "cuda/launch.cuh"

namespace gatedrnn::cuda {

using ChunkTraits = KnownTraits<1>;
constexpr int kRowSegments = ChunkTraits::kChannels;

// The order of tickets, for every group: the carries of the previous group, the sums of this group,
// the scans of the previous group. Each task waits only for smaller tickets (tasks.cuh).
struct ChunkPlan {
  int group, groups;  // units in a group; the last group may be smaller
  int chains;         // maximum for a unit and direction; a thread carries one
  int carries;        // tasks of a unit, one warp of chains each
  int tickets;
  FastDivisor by_group, by_carries, by_tiles, by_columns;  // tickets of a group; tasks of a unit
};

struct ChunkParams {
  ScanArgs a;
  TilePlan p;
  ChunkPlan plan;
  int channels;  // channels of the maps, if `a` describes row segments; else 0
  int* ticket;
  int *summed, *carried;  // finished tasks of each unit
  // The gain of every chunk of a line. And its offset, which stage 2 replaces by the state that
  // enters the chunk.
  Borders<float> gains, states;
};

// For all threads: waits until the counter of a unit reaches `count`.
GATEDRNN_DEVICE void wait_arrivals(const int* counter, int count) {
  if (threadIdx.x == 0) wait_for(counter, count);
  block_sync<ChunkTraits>();
}
// For all threads: publishes their writes, by adding one to a counter.
GATEDRNN_DEVICE void arrive(int* counter) {
  block_sync<ChunkTraits>();
  if (threadIdx.x == 0) add_release(counter, 1);
}

// Computes h after a chunk of a line, pixel by pixel from global memory. It is for chunks where
// gain * h + offset would give NaN or infinity although h is finite. `c` is a channel or a segment.
GATEDRNN_NOINLINE float carry_through_chunk(const ChunkParams& f, int d, int64_t n, int64_t c,
                                            int64_t line, int chunk, float h) {
  const ScanArgs& a = f.a;
  const Direction direction = f.p.walks[d];
  const bool rows = direction.along_width;
  const LineStrides x = line_strides(a.x_strides, rows), g = line_strides(a.g_strides, rows);
  const int side = f.p.side;
  int64_t begin = int64_t{chunk} * (rows ? f.p.pitch : side);
  int64_t end = begin + side;
  if (const int64_t length = rows ? a.w : a.h; f.channels == 0 && end > length) end = length;
  if (f.channels && !rows) {
    if (end > a.h) end = a.h;
    line += line / side * (f.p.pitch - side);  // skips the other segments
  }
  const int64_t x_line = n * a.x_strides.n + c * x.c + line * x.l;
  const int64_t g_line = n * a.g_strides.n + (a.gate_directions ? d * a.g_strides.d : 0) +
                         (a.gate_channels ? c * g.c : 0) + line * g.l;
  const int64_t at = f.channels ? d * f.channels + n % f.channels : d * a.c + c;
  const float w = static_cast<const float*>(a.weight)[at];
  const float b = a.bias ? static_cast<const float*>(a.bias)[at] : 0;
  dispatch_storage<float>(a.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = direction.reverse ? begin + end - 1 - i : i;
      float gate = 1;
      if (a.g)
        gate = activate_gate<ScalarMath<float>>(
            a.gate_activation, to_state<float>(static_cast<const S*>(a.g)[g_line + t * g.t]));
      h = preactivation(to_state<float>(static_cast<const S*>(a.x)[x_line + t * x.t]), gate,
                        b + w * h);
    }
  });
  return h;
}

GATEDRNN_DEVICE bool is_finite(float v) { return v - v == 0; }

// Carries the state along a chain of chunks. It stores the state that enters each chunk. W chunks
// are contiguous in memory: place(i) is the first of W. walk(i, h) computes h after chunk i, pixel
// by pixel.
template <int W, class Place, class Walk>
GATEDRNN_DEVICE void carry_chain(const float* gains, float* states, int count, bool from_end,
                                 const Place& place, const Walk& walk) {
  constexpr int ahead = 16 / W;  // loads in flight, of W chunks each
  float h = 0;
  for (int k = 0; k < count; k += ahead) {
    Pack<float, W> gain[ahead] = {}, state[ahead] = {};  // zeros: see copy_vectorized
    const auto number = [&](int j) { return from_end ? count - 1 - k - j : k + j; };
#pragma unroll
    for (int j = 0; j < ahead; ++j)
      if (k + j < count) {
        gain[j] = load_bypass_l1(&pack_at<W>(gains + place(number(j))));
        state[j] = load_bypass_l1(&pack_at<W>(states + place(number(j))));
      }
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      if (k + j >= count) continue;
#pragma unroll
      for (int i = 0; i < W; ++i) {
        // Constant indices only: an index that is not constant would move the packs to memory.
        const auto pass = [&](float factor, float& place_of_state, int at) {
          const float offset = place_of_state, entering = h;
          // A product may overflow where a closed gate would have stopped the state.
          h = is_finite(factor) && is_finite(offset) && is_finite(h) ? offset + factor * h
                                                                     : walk(number(j) * W + at, h);
          place_of_state = entering;
        };
        if (from_end)
          pass(gain[j].values[W - 1 - i], state[j].values[W - 1 - i], W - 1 - i);
        else
          pass(gain[j].values[i], state[j].values[i], i);
      }
      pack_at<W>(states + place(number(j))) = state[j];
    }
  }
}

// A thread carries the state of one chain, and neighbouring threads have neighbouring chains in
// memory. A chain is a line of one channel, or of one segment along columns. Along rows, the
// segments of a line form one chain. `index` counts the chains of a unit, ChunkTraits::kThreads at
// a time.
GATEDRNN_DEVICE void carry_lines(const ChunkParams& f, int index) {
  const Task& t = task_slot().task;
  const Ticket<ChunkTraits> ticket(f.ticket);
  const int i = index * ChunkTraits::kThreads + static_cast<int>(threadIdx.x);
  const int d = i / f.plan.chains, chain = i % f.plan.chains;
  if (d < f.a.directions) {
    const Direction direction = f.p.walks[d];
    const bool rows = direction.along_width, joined = rows && f.channels > 0;
    const int tiles = rows ? f.p.tile_columns : f.p.tile_rows;
    const int lines = f.p.side * (rows ? f.p.tile_rows : f.p.tile_columns);
    const int line = joined ? chain : chain / ChunkTraits::kChannels,
              c = joined ? 0 : chain % ChunkTraits::kChannels;
    if (line < (rows ? f.a.h : f.a.w) && c < t.channels) {
      const int64_t first = t.unit * f.p.border_size() + int64_t{line} * ChunkTraits::kChannels + c;
      const float* const gains = f.gains.states[d] + first;
      float* const states = f.states.states[d] + first;
      const int64_t apart = int64_t{lines} * ChunkTraits::kChannels;
      if (joined)
        carry_chain<kPack>(
            gains, states, tiles * (kRowSegments / kPack), direction.reverse,
            [&](int k) {
              return k / (kRowSegments / kPack) * apart + k % (kRowSegments / kPack) * kPack;
            },
            [&](int chunk, float h) {
              return carry_through_chunk(f, d, t.n, chunk % kRowSegments, line,
                                         chunk / kRowSegments, h);
            });
      else
        carry_chain<1>(
            gains, states, tiles, direction.reverse, [&](int k) { return k * apart; },
            [&](int chunk, float h) {
              return carry_through_chunk(f, d, t.n, t.c0 + c, line, chunk, h);
            });
    }
  }
  ticket.keep();
  arrive(f.carried + t.unit);
}

}  // namespace gatedrnn::cuda
