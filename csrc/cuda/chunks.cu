// Forward pass by chunks, for diagonal weights and theta = identity.
//
// Along any chunk of a line, the recurrence of a channel is h_out = gain * h_in + offset, and such
// maps compose. A chunk is the part of a line in one tile. Stage 1 sums: it finds gain and offset
// of all chunks, in parallel. Stage 2 carries the states from chunk to chunk. Stage 3 scans every
// tile in all directions, in one visit.
//
// One kernel runs all three stages. While it scans one group of units, it sums the next group. So
// the second read of x and g finds them in the L2 cache.
#include "cuda/chunks.cuh"
#include "cuda/forward.cuh"
#include "cuda/merge.cuh"

namespace gatedrnn::cuda {
namespace {

using T = ChunkTraits;

enum class ChunkStage { kCarry, kSum, kScan };
struct ChunkTask {
  ChunkStage stage;
  int unit, index;  // of a tile or a carry. Units outside of the range are empty tasks
};
GATEDRNN_DEVICE ChunkTask chunk_task(const ChunkParams& f, int ticket) {
  const ChunkPlan& plan = f.plan;
  const int carries = plan.group * plan.carries, tiles = plan.group * f.p.tiles();
  const int at = plan.by_group.quotient(ticket);
  int rest = ticket - at * static_cast<int>(plan.by_group.by);
  if (rest < carries) {
    const int member = plan.by_carries.quotient(rest);
    return {ChunkStage::kCarry, (at - 1) * plan.group + member, rest - member * plan.carries};
  }
  rest -= carries;
  const bool scans = rest >= tiles;
  if (scans) rest -= tiles;
  const int member = plan.by_tiles.quotient(rest);
  return {scans ? ChunkStage::kScan : ChunkStage::kSum, (scans ? at - 1 : at) * plan.group + member,
          rest - member * f.p.tiles()};
}

// Tiles in shared memory: x; the gates, for each axis if they differ; the merged states of each
// axis; and with a mask its bytes.
struct ChunkTiles {
  float* x;
  PerAxis<float> g, h;
  PerAxis<uint8_t> argmax;
  GATEDRNN_DEVICE explicit ChunkTiles(const ScanArgs& a) {
    constexpr int tile = T::kTile;
    x = shared_at<float>(kTilesBegin);
    h = {x + tile, tile};
    g = {x + 3 * tile, a.gate_directions ? tile : 0};
    argmax = {reinterpret_cast<uint8_t*>(g[1] + tile), tile};
  }
  static size_t bytes(const ScanArgs& a) {
    return shared_bytes<T>(a, 3) + (a.mask ? 2 * T::kTile : 0);
  }
};

using Values = float[T::kChannels];  // the channels of a pixel or a line, in one thread

// The carries of a tile's lines, in an array of states or of gains.
GATEDRNN_DEVICE Border<float> border_of(const ChunkParams& f, const Task& t, float* states,
                                        int axis) {
  float* const at = states + f.p.border(t.unit, t.cell, axis);
  return {at, at};
}

GATEDRNN_DEVICE T::Weights weights_of(const ChunkParams& f, const Task& t, int d,
                                      const T::Lane& lane) {
  if (f.channels == 0) return T::Weights(f.a, t, d, lane);
  const int at = d * f.channels + t.unit % f.channels;
  T::Weights one;
#pragma unroll
  for (int k = 0; k < kRowSegments; ++k) {
    one.w[k][0] = static_cast<const float*>(f.a.weight)[at];
    one.bias[k] = f.a.bias ? static_cast<const float*>(f.a.bias)[at] : 0;
  }
  return one;
}

// Computes gain and offset for every line, channel and direction of a tile. One walk along a line
// serves both directions of an axis: the map of the opposite direction is composed from its far
// end.
GATEDRNN_DEVICE void sum_tile(const ChunkParams& f) {
  Task t = task_slot().task;
  const ChunkTiles tiles(f.a);
  const ScanArgs& a = f.a;
  const int axis = threadIdx.x / (T::kThreads / 2);
  const LineWalk walk = LineWalk::of<T::kSide>(t, axis);  // along the line
  T::Lane lane;
  lane.is_there = lane.line < walk.lines;
  const Ticket<T> ticket(f.ticket);
#pragma unroll 1
  for (int pass = 0; pass < (a.gate_directions ? f.p.passes : 1); ++pass) {
    if (pass > 0) block_sync<T>();  // all threads are done with the last pass's gates
    t.pass = pass;
    load_inputs<T>(whole_block<T>(), f.p, t, a, f.p.direction[pass], tiles.x, tiles.g);
    if (pass == 0) ticket.keep();
    block_sync<T>();
    int along = -1, against = -1;
    for (int i = 0; i < f.p.passes; ++i)
      if (i == pass || !a.gate_directions)
        (f.p.from_end[i] ? against : along) = f.p.direction[i][axis];
    if (!lane.is_there) continue;
    const T::Weights forth = weights_of(f, t, along < 0 ? 0 : along, lane);
    const T::Weights back = weights_of(f, t, against < 0 ? 0 : against, lane);
    Values x, g, gain, offset = {}, gain_back, offset_back = {};
#pragma unroll
    for (int c = 0; c < T::kChannels; ++c) gain[c] = gain_back[c] = 1;
    const auto fetch = [&](int at) {
      T::get(tiles.x, at, x);
      T::get(tiles.g[axis], at, g);
    };
    T::for_each_pixel(walk, lane, fetch, [&](int, int next, bool has_next) {
#pragma unroll
      for (int c = 0; c < T::kChannels; ++c) {
        offset[c] = preactivation(x[c], g[c], forth.bias[c] + forth.w[c][0] * offset[c]);
        gain[c] *= g[c] * forth.w[c][0];
        offset_back[c] += gain_back[c] * preactivation(x[c], g[c], back.bias[c]);
        gain_back[c] *= g[c] * back.w[c][0];
      }
      if (has_next) fetch(next);
    });
    if (along >= 0) {
      T::store_carry(border_of(f, t, f.gains.states[along], axis), lane, gain);
      T::store_carry(border_of(f, t, f.states.states[along], axis), lane, offset);
    }
    if (against >= 0) {
      T::store_carry(border_of(f, t, f.gains.states[against], axis), lane, gain_back);
      T::store_carry(border_of(f, t, f.states.states[against], axis), lane, offset_back);
    }
  }
  arrive(f.summed + t.unit);
}

// Scans the lines of a tile in direction d. If `Merges`, it merges with the states that the axis'
// other direction left in the same place.
template <MergeOp Op, bool Merges>
GATEDRNN_DEVICE void scan_lines(const ChunkParams& f, const Task& t, int d, const LineWalk& walk,
                                const T::Lane& lane, const ChunkTiles& tiles) {
  constexpr bool has_argmax = Op == MergeOp::kMaxWithArgMax;
  const T::Weights w = weights_of(f, t, d, lane);
  Values h, x, g, before = {};
  uint8_t argmax[T::kChannels] = {};
  T::load_carry(border_of(f, t, f.states.states[d], walk.axis), lane, h);
  const auto fetch = [&](int at) {
    T::get(tiles.x, at, x);
    T::get(tiles.g[walk.axis], at, g);
    if (Merges) T::get(tiles.h[walk.axis], at, before);
    if (Merges && has_argmax) T::get(tiles.argmax[walk.axis], at, argmax);
  };
  T::for_each_pixel(walk, lane, fetch, [&](int here, int next, bool has_next) {
    Values left;
#pragma unroll
    for (int c = 0; c < T::kChannels; ++c) {
      h[c] = preactivation(x[c], g[c], w.bias[c] + w.w[c][0] * h[c]);
      ArgMax<float> v{h[c], 1u << d};
      if (Merges) v = merged<Op>(ArgMax<float>{before[c], argmax[c]}, v);
      left[c] = v.value;
      argmax[c] = static_cast<uint8_t>(v.bits);
    }
    T::put(tiles.h[walk.axis], here, left);
    if (has_argmax) T::put(tiles.argmax[walk.axis], here, argmax);
    if (has_next) fetch(next);
  });
}

// Merges both axes and writes the result. `rows` and `columns` say which axes have a direction.
template <MergeOp Op>
GATEDRNN_DEVICE void write_axes(const ChunkParams& f, const Task& t, const ChunkTiles& tiles,
                                bool rows, bool columns) {
  constexpr bool has_argmax = Op == MergeOp::kMaxWithArgMax;
  const ScanArgs& a = f.a;
  const float scale = merge_scale<float>(a);
  const auto of_both = [&](int cell) {
    const auto of = [&](int i) {
      return ArgMax<float>{tiles.h[i][cell], has_argmax ? unsigned{tiles.argmax[i][cell]} : 0u};
    };
    return rows && columns ? merged<Op>(of(0), of(1)) : of(rows ? 0 : 1);
  };
  const int64_t corner = tile_corner(f.p, t, a.y_strides, 0, t.c0);
  dispatch_storage<float>(a.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    write_tile<T>(whole_block<T>(), t, a.y_strides, static_cast<S*>(a.y) + corner,
                  [&](int cell) { return to_storage<S>(of_both(cell).value * scale); });
  });
  if constexpr (has_argmax) {
    write_tile<T>(whole_block<T>(), t, a.y_strides, a.mask + corner,
                  [&](int cell) { return static_cast<uint8_t>(of_both(cell).bits); });
  }
}

// Scans a tile in all directions, and writes the merged result.
GATEDRNN_DEVICE void scan_tile(const ChunkParams& f) {
  Task t = task_slot().task;
  const ChunkTiles tiles(f.a);
  const ScanArgs& a = f.a;
  const bool merges = a.merge != Merge::kNone;
  const int axis = threadIdx.x / (T::kThreads / 2);
  T::Lane lane;
  bool rows = false, columns = false;  // whether that axis had a direction so far
  const Ticket<T> ticket(f.ticket);
#pragma unroll 1
  for (int pass = 0; pass < f.p.passes; ++pass) {
    t.pass = pass;
    t.from_end = f.p.from_end[pass];
    if (pass == 0 || a.gate_directions) {
      if (pass > 0) block_sync<T>();  // all threads are done with the last pass's gates
      load_inputs<T>(whole_block<T>(), f.p, t, a, f.p.direction[pass], tiles.x, tiles.g);
      if (pass == 0) ticket.keep();
      block_sync<T>();
    }
    const int d = f.p.direction[pass][axis];
    const LineWalk walk = LineWalk::of<T::kSide>(t, axis);
    lane.is_there = d >= 0 && lane.line < walk.lines;
    if (lane.is_there)
      dispatch_merge_op(merge_op(a), [&]<MergeOp Op>() {
        if (merges && (axis == 0 ? rows : columns))
          scan_lines<Op, true>(f, t, d, walk, lane, tiles);
        else
          scan_lines<Op, false>(f, t, d, walk, lane, tiles);
      });
    rows |= f.p.direction[pass][0] >= 0;
    columns |= f.p.direction[pass][1] >= 0;
    if (merges) continue;
    block_sync<T>();
#pragma unroll 1
    for (int i = 0; i < kAxes; ++i)
      if (const int one = f.p.direction[pass][i]; one >= 0)
        write_map<T>(whole_block<T>(), f.p, t, a, one, tiles.h[i]);
    block_sync<T>();
  }
  if (!merges) return;
  block_sync<T>();
  dispatch_merge_op(merge_op(a), [&]<MergeOp Op>() { write_axes<Op>(f, t, tiles, rows, columns); });
}

// A block runs one task at a time: a sum, a carry or a scan. Threads own lines as in the wavefront
// kernel. Loads and stores run along the contiguous axis. Shared memory holds ChunkTiles. States
// are float.
__global__ void __launch_bounds__(T::kThreads, T::kScanBlocks)
    chunk_kernel(const __grid_constant__ ChunkParams f) {
  const auto decode = [&](int ticket, Task& t) {
    const ChunkTask task = chunk_task(f, ticket);
    const bool tile = task.stage != ChunkStage::kCarry;
    const int row = tile ? f.plan.by_columns.quotient(task.index) : 0;
    const Cell cell{row, tile ? task.index - row * f.p.tile_columns : 0};
    if (task.unit >= 0 && task.unit < f.p.units) t = f.p.task(task.unit, cell);
  };
  Tasks<T, decltype(decode)> tasks(f.ticket, f.plan.tickets, decode);
  for (; tasks.next(); tasks.look_ahead()) {
    const ChunkTask task = chunk_task(f, task_slot().ticket);
    if (task.unit < 0 || task.unit >= f.p.units) {
      Ticket<T>(f.ticket).keep();
    } else if (task.stage == ChunkStage::kSum) {
      sum_tile(f);
    } else if (task.stage == ChunkStage::kCarry) {
      wait_arrivals(f.summed + task.unit, f.p.tiles());
      carry_lines(f, task.index);
    } else {
      wait_arrivals(f.carried + task.unit, f.plan.carries);
      scan_tile(f);
    }
  }
}

// Chains for each unit and direction. A thread carries the states of one chain.
int64_t chains(const ChunkParams& f) {
  const int64_t rows = int64_t{f.p.side} * f.p.tile_rows * (f.channels ? 1 : T::kChannels);
  const int64_t columns = int64_t{f.p.side} * f.p.tile_columns * T::kChannels;
  return std::max(rows, columns);
}

// A group has as many units as keep the GPU busy: about two tasks of each stage for a block. It is
// smaller if two groups would not fit in the L2 cache.
ChunkPlan plan_chunks(const ChunkParams& f, int blocks) {
  const TilePlan& p = f.p;
  const int64_t unit_bytes =
      int64_t{p.tiles()} * p.side * p.side * p.channels * bytes_of(f.a.dtype);
  const int64_t held = device_attribute(cudaDevAttrL2CacheSize) / (5 * unit_bytes);
  ChunkPlan plan{};
  plan.group = static_cast<int>(
      std::clamp<int64_t>(std::min(2 * int64_t{blocks} / p.tiles(), held), 1, p.units));
  plan.groups = static_cast<int>(ceil_div(p.units, plan.group));
  const int64_t carries = ceil_div(f.a.directions * chains(f), T::kThreads);
  const int64_t per_group = plan.group * (carries + 2 * p.tiles());
  if (per_group * (plan.groups + 1) > INT_MAX - (1 << 20))
    throw std::runtime_error("gatedrnn: the maps have more tiles than a call on a GPU can count");
  plan.chains = static_cast<int>(chains(f));
  plan.carries = static_cast<int>(carries);
  plan.tickets = static_cast<int>(per_group) * (plan.groups + 1);
  plan.by_group = FastDivisor(static_cast<int>(per_group));
  plan.by_carries = FastDivisor(plan.carries);
  plan.by_tiles = FastDivisor(p.tiles());
  plan.by_columns = FastDivisor(p.tile_columns);
  return plan;
}

// Whether the channels of all images are contiguous, with rows that have no gaps.
bool is_dense(const ScanArgs& a, const Strides& s) {
  return s.w == 1 && (a.n == 1 || a.c == 1 || s.n == a.c * s.c);
}

// Dense maps, seen as row segments: each channel becomes an image, and its segments the channels.
bool has_row_segments(const ScanArgs& a) {
  const bool gate_alike =
      !a.g || (a.gate_channels && !a.gate_directions && is_dense(a, a.g_strides));
  return a.w % (kRowSegments * T::kSide) == 0 && a.merge != Merge::kNone && gate_alike &&
         is_dense(a, a.x_strides) && is_dense(a, a.y_strides);
}
ScanArgs in_row_segments(ScanArgs a) {
  for (Strides* s : {&a.x_strides, &a.g_strides, &a.y_strides}) {
    if (a.c > 1) s->n = s->c;
    s->c = T::kSide * s->w;
  }
  a.n *= a.c;
  a.c = kRowSegments;
  a.w /= kRowSegments;
  return a;
}

}  // namespace

bool can_use_chunks(const ScanArgs& a) {
  return a.block == 1 && a.nonlinearity == Nonlinearity::kIdentity && a.dtype != Dtype::kFloat64 &&
         fits(ChunkTiles::bytes(a));
}

int64_t forward_by_chunks(const ScanArgs& a, void* memory, cudaStream_t stream) {
  Workspace workspace(memory);
  ChunkParams f{};
  const bool row_segments = has_row_segments(a);
  f.channels = row_segments ? static_cast<int>(a.c) : 0;
  f.a = row_segments ? in_row_segments(a) : a;
  f.p = plan_tiles(f.a, T::kSide, T::kChannels);
  if (row_segments) f.p.pitch = kRowSegments * T::kSide;
  if (f.a.directions * chains(f) > INT_MAX - T::kThreads)
    throw std::runtime_error("gatedrnn: the maps have more lines than a call on a GPU can count");
  const int64_t counters = 1 + 2 * int64_t{f.p.units};
  f.ticket = workspace.take<int>(counters);
  f.summed = f.ticket + 1;
  f.carried = f.summed + f.p.units;
  f.gains = take_borders<float>(workspace, f.a, f.p);
  f.states = take_borders<float>(workspace, f.a, f.p);
  if (workspace.counts_only()) return workspace.bytes();
  const size_t shared = ChunkTiles::bytes(a);
  const int most = resident_blocks(chunk_kernel, T::kThreads, shared, INT_MAX);
  f.plan = plan_chunks(f, most);
  check(cudaMemsetAsync(f.ticket, 0, counters * sizeof(int), stream), "cudaMemsetAsync");
  launch(chunk_kernel, dim3(static_cast<unsigned>(std::min(most, f.plan.tickets))),
         dim3(T::kThreads), shared, stream, f);
  check_launch("chunk_kernel");
  return workspace.bytes();
}

}  // namespace gatedrnn::cuda
