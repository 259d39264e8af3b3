// Forward pass by chunks, for diagonal weights and theta = identity. A channel's recurrence is then
// h_out = gain * h_in + offset along any chunk of a line, and such maps compose: the chunks of a
// line, one to a tile, are summed up side by side, then their states are carried through, and then
// every tile is scanned in all directions in one visit.
//
// One kernel does all three, a group of units after the other: while a group is scanned, the next
// one is summed up. What is read twice, x and g, is thus found in the L2 cache the second time.
#include "cuda/forward.h"
#include "cuda/merge.h"

namespace gatedrnn::cuda {
namespace {

using T = KnownSteps<1>;

// Tickets: for every group the carries of the group before, the sums of this one, and the scans of
// the group before. Each waits for smaller tickets only, as wavefront.h asks for.
struct ChunkPlan {
  int group, groups;  // units in a group; the last one may be smaller
  int carries;        // tasks of a unit
  int per_group, tickets;
};

struct ChunkParams {
  ScanArgs a;
  TilePlan p;
  ChunkPlan plan;
  int* ticket;
  int *summed, *carried;         // tasks done of each unit
  Borders<float> gains, states;  // states: offsets, until they are carried through
};

enum class ChunkStage { kCarry, kSum, kScan };
struct ChunkTask {
  ChunkStage stage;
  int unit, index;  // of a tile, or of a carry; there is no such unit in what a group lacks
};
GATEDRNN_DEVICE ChunkTask chunk_task(const ChunkParams& f, int ticket) {
  const ChunkPlan& plan = f.plan;
  const int carries = plan.group * plan.carries, tiles = plan.group * f.p.tiles();
  const int at = ticket / plan.per_group;
  int rest = ticket % plan.per_group;
  if (rest < carries)
    return {ChunkStage::kCarry, (at - 1) * plan.group + rest / plan.carries, rest % plan.carries};
  rest -= carries;
  const bool scans = rest >= tiles;
  if (scans) rest -= tiles;
  return {scans ? ChunkStage::kScan : ChunkStage::kSum,
          (scans ? at - 1 : at) * plan.group + rest / f.p.tiles(), rest % f.p.tiles()};
}

// For all threads: a unit's counter has come to `count`.
GATEDRNN_DEVICE void wait_count(const int* counter, int count) {
  if (threadIdx.x == 0) wait_for(counter, count);
  meet<T>();
}
// For all threads: what they have written is there.
GATEDRNN_DEVICE void count_one(int* counter) {
  meet<T>();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(counter, 1);
  }
}

// Tiles in shared memory: x; gates, of both axes where they differ; what an axis' directions merge
// to, and with a mask their winners, a byte each.
struct ChunkTiles {
  float* x;
  Pair<float> g, h;
  Pair<uint8_t> winners;
  GATEDRNN_DEVICE explicit ChunkTiles(const ScanArgs& a) {
    constexpr int tile = T::kTile;
    x = shared_at<float>(kTilesBegin);
    g = {x + tile, a.gate_directions ? 3 * tile : 0};
    h = {x + 2 * tile, tile};
    winners = {reinterpret_cast<uint8_t*>(g[1] + (a.gate_directions ? tile : 3 * tile)), tile};
  }
  static size_t bytes(const ScanArgs& a) {
    return shared_bytes<T>(a, a.gate_directions ? 5 : 4) + (a.mask ? 2 * T::kTile : 0);
  }
};

using Values = float[T::kChannels];  // a pixel's, or a line's, in one thread

// The states, or gains, of a thread's line that leave a tile.
GATEDRNN_DEVICE Border<float> border_of(const ChunkParams& f, const Task& t, float* states,
                                        int axis) {
  return {nullptr, states + f.p.border(t.unit, t.cell, axis)};
}

// Gain and offset of every line, channel and direction of a tile. Both directions of an axis walk
// a line once: the one that goes against it composes its map from the other end.
GATEDRNN_PART void sum_tile(const ChunkParams& f) {
  Task t = task_slot().task;
  const ChunkTiles tiles(f.a);
  const ScanArgs& a = f.a;
  const int axis = threadIdx.x / (T::kThreads / 2);
  const Path path = Path::of<T::kSide>(t, axis);  // along the line
  T::Lane lane;
  lane.is_there = lane.line < path.lines;
#pragma unroll 1
  for (int pass = 0; pass < (a.gate_directions ? f.p.passes : 1); ++pass) {
    if (pass > 0) meet<T>();  // all are done with the gates before
    t.pass = pass;
    load_inputs<T>(whole_block<T>(), f.p, t, a, f.p.direction[pass], tiles.x, tiles.g);
    meet<T>();
    int along = -1, against = -1;
    for (int i = 0; i < f.p.passes; ++i)
      if (i == pass || !a.gate_directions)
        (f.p.from_end[i] ? against : along) = f.p.direction[i][axis];
    if (!lane.is_there) continue;
    const T::Weights forth(a, t, along < 0 ? 0 : along, lane);
    const T::Weights back(a, t, against < 0 ? 0 : against, lane);
    Values x, g, gain, offset = {}, gain_back, offset_back = {};
#pragma unroll
    for (int c = 0; c < T::kChannels; ++c) gain[c] = gain_back[c] = 1;
    const auto fetch = [&](int at) {
      T::get(tiles.x, at, x);
      T::get(tiles.g[axis], at, g);
    };
    T::walk(path, lane, fetch, [&](int, int next, bool has_next) {
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
      T::leave(border_of(f, t, f.gains.states[along], axis), lane, gain);
      T::leave(border_of(f, t, f.states.states[along], axis), lane, offset);
    }
    if (against >= 0) {
      T::leave(border_of(f, t, f.gains.states[against], axis), lane, gain_back);
      T::leave(border_of(f, t, f.states.states[against], axis), lane, offset_back);
    }
  }
  count_one(f.summed + t.unit);
}

// h behind a chunk of a line, pixel by pixel from global memory: where gain * h + offset would say
// NaN, or infinity, of what is finite.
GATEDRNN_DEVICE float walk_chunk(const ChunkParams& f, int d, int64_t n, int64_t c, int64_t line,
                                 int chunk, float h) {
  const ScanArgs& a = f.a;
  const Direction direction = f.p.walks[d];
  const int64_t length = direction.along_width ? a.w : a.h, begin = int64_t{chunk} * f.p.side;
  const int64_t end = begin + f.p.side < length ? begin + f.p.side : length;
  const LineStrides x = line_strides(a.x_strides, direction.along_width);
  const LineStrides g = line_strides(a.g_strides, direction.along_width);
  const int64_t x_line = n * a.x_strides.n + c * x.c + line * x.l;
  const int64_t g_line = n * a.g_strides.n + (a.gate_directions ? d * a.g_strides.d : 0) +
                         (a.gate_channels ? c * g.c : 0) + line * g.l;
  const float w = static_cast<const float*>(a.weight)[d * a.c + c];
  const float b = a.bias ? static_cast<const float*>(a.bias)[d * a.c + c] : 0;
  with_storage<float>(a.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = direction.reverse ? begin + end - 1 - i : i;
      float gate = 1;
      if (a.g)
        gate = gate_norm_of<ScalarMath<float>>(
            a.gate_norm, to_state<float>(static_cast<const S*>(a.g)[g_line + t * g.t]));
      h = preactivation(to_state<float>(static_cast<const S*>(a.x)[x_line + t * x.t]), gate,
                        b + w * h);
    }
  });
  return h;
}

GATEDRNN_DEVICE bool is_finite(float v) { return v - v == 0; }

// A thread carries the state of one line and channel from chunk to chunk, its neighbours those
// beside in memory. `index` counts a unit's directions, lines and channels, T::kThreads at a time.
GATEDRNN_PART void carry_lines(const ChunkParams& f, int index) {
  const Task& t = task_slot().task;
  const int most = f.p.side * (f.p.tile_rows > f.p.tile_columns ? f.p.tile_rows : f.p.tile_columns);
  const int64_t i = int64_t{index} * T::kThreads + threadIdx.x;
  const int c = static_cast<int>(i % T::kChannels),
            line = static_cast<int>(i / T::kChannels % most);
  const int d = static_cast<int>(i / T::kChannels / most);
  if (d < f.a.directions && c < t.channels) {
    const Direction direction = f.p.walks[d];
    const bool rows = direction.along_width;
    const int chunks = rows ? f.p.tile_columns : f.p.tile_rows;
    const int lines = f.p.side * (rows ? f.p.tile_rows : f.p.tile_columns);
    if (line < (rows ? f.a.h : f.a.w)) {
      const int64_t first = t.unit * f.p.border_size() + int64_t{line} * T::kChannels + c;
      const float* const gains = f.gains.states[d] + first;
      float* const states = f.states.states[d] + first;
      float h = 0;
      constexpr int ahead = 16;
      for (int k = 0; k < chunks; k += ahead) {
        float gain[ahead] = {}, offset[ahead] = {};  // see walk_places
        const auto chunk = [&](int j) { return direction.reverse ? chunks - 1 - k - j : k + j; };
        const auto place = [&](int j) { return int64_t{chunk(j)} * lines * T::kChannels; };
#pragma unroll
        for (int j = 0; j < ahead; ++j)
          if (k + j < chunks) {
            gain[j] = load_shared_by_blocks(gains + place(j));
            offset[j] = load_shared_by_blocks(states + place(j));
          }
#pragma unroll
        for (int j = 0; j < ahead; ++j)
          if (k + j < chunks) {
            // Between pixels a product may overflow that a closed gate would have stopped.
            if (is_finite(gain[j]) && is_finite(offset[j]) && is_finite(h))
              h = offset[j] + gain[j] * h;
            else
              h = walk_chunk(f, d, t.n, t.c0 + c, line, chunk(j), h);
            states[place(j)] = h;
          }
      }
    }
  }
  count_one(f.carried + t.unit);
}

// Scans a tile in all directions and writes what they merge to.
template <Rule R>
GATEDRNN_PART void scan_tile(const ChunkParams& f) {
  Task t = task_slot().task;
  const ChunkTiles tiles(f.a);
  const ScanArgs& a = f.a;
  constexpr bool has_winners = R == Rule::kMaxWithWinners;
  const float scale = merge_scale<float>(a);
  const bool merges = a.merge != Merge::kNone;
  const int axis = threadIdx.x / (T::kThreads / 2);
  T::Lane lane;
  bool rows = false, columns = false;  // whether a direction of that axis was there
#pragma unroll 1
  for (int pass = 0; pass < f.p.passes; ++pass) {
    t.pass = pass;
    t.from_end = f.p.from_end[pass];
    if (pass == 0 || a.gate_directions) {
      if (pass > 0) meet<T>();  // all are done with the gates before
      load_inputs<T>(whole_block<T>(), f.p, t, a, f.p.direction[pass], tiles.x, tiles.g);
      meet<T>();
    }
    const int d = f.p.direction[pass][axis];
    const Path path = Path::of<T::kSide>(t, axis);
    lane.is_there = d >= 0 && lane.line < path.lines;
    if (lane.is_there) {
      // In place merged with what the axis' other direction has left.
      const bool begins = !(axis == 0 ? rows : columns) || !merges;
      const T::Weights w(a, t, d, lane);
      Values h, x, g, before = {};
      uint8_t winners[T::kChannels] = {};
      T::enter(Border<float>::of(f.p, t, f.states.states[d], axis, t.from_end), lane, h);
      const auto fetch = [&](int at) {
        T::get(tiles.x, at, x);
        T::get(tiles.g[axis], at, g);
        if (begins) return;
        T::get(tiles.h[axis], at, before);
        if (has_winners) T::get(tiles.winners[axis], at, winners);
      };
      T::walk(path, lane, fetch, [&](int here, int next, bool has_next) {
        Values left;
#pragma unroll
        for (int c = 0; c < T::kChannels; ++c) {
          h[c] = preactivation(x[c], g[c], w.bias[c] + w.w[c][0] * h[c]);
          Winner<float> v{h[c], 1u << d};
          if (!begins) v = merged<R>(Winner<float>{before[c], winners[c]}, v);
          left[c] = v.value;
          winners[c] = static_cast<uint8_t>(v.bits);
        }
        T::put(tiles.h[axis], here, left);
        if (has_winners) T::put(tiles.winners[axis], here, winners);
        if (has_next) fetch(next);
      });
    }
    rows |= f.p.direction[pass][0] >= 0;
    columns |= f.p.direction[pass][1] >= 0;
    if (merges) continue;
    meet<T>();
    for (int i = 0; i < kAxes; ++i)
      if (const int one = f.p.direction[pass][i]; one >= 0)
        write_map<T>(whole_block<T>(), f.p, t, a, one, tiles.h[i]);
    meet<T>();
  }
  if (!merges) return;
  meet<T>();
  const auto of_both = [&](int cell) {
    const auto of = [&](int i) {
      return Winner<float>{tiles.h[i][cell], has_winners ? unsigned{tiles.winners[i][cell]} : 0u};
    };
    return rows && columns ? merged<R>(of(0), of(1)) : of(rows ? 0 : 1);
  };
  const int64_t corner = tile_corner(f.p, t, a.y_strides, 0, t.c0);
  with_storage<float>(a.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    write_tile<T>(whole_block<T>(), t, a.y_strides, static_cast<S*>(a.y) + corner,
                  [&](int cell) { return to_storage<S>(of_both(cell).value * scale); });
  });
  if constexpr (has_winners)
    write_tile<T>(whole_block<T>(), t, a.y_strides, a.mask + corner,
                  [&](int cell) { return static_cast<uint8_t>(of_both(cell).bits); });
}

// A block does a task at a time.
__global__ void __launch_bounds__(T::kThreads, T::kScanBlocks)
    chunk_kernel(const __grid_constant__ ChunkParams f) {
  const auto decode = [&](int ticket, Task& t) {
    const ChunkTask task = chunk_task(f, ticket);
    const bool tile = task.stage != ChunkStage::kCarry;
    const Cell cell{task.index / f.p.tile_columns, task.index % f.p.tile_columns};
    if (task.unit >= 0 && task.unit < f.p.units) t = f.p.task(task.unit, tile ? cell : Cell{0, 0});
  };
  Tickets<T, decltype(decode)> tickets(f.ticket, f.plan.tickets, decode);
  for (; tickets.next(); tickets.look_ahead()) {
    const ChunkTask task = chunk_task(f, task_slot().ticket);
    if (task.unit < 0 || task.unit >= f.p.units) continue;
    if (task.stage == ChunkStage::kSum) {
      sum_tile(f);
    } else if (task.stage == ChunkStage::kCarry) {
      wait_count(f.summed + task.unit, f.p.tiles());
      carry_lines(f, task.index);
    } else {
      wait_count(f.carried + task.unit, f.plan.carries);
      with_rule(rule_of(f.a), [&]<Rule R>() { scan_tile<R>(f); });
    }
  }
}

// Groups of as many units as keep the device busy: a block has some two tasks of each stage.
ChunkPlan plan_chunks(const ScanArgs& a, const TilePlan& p, int blocks) {
  ChunkPlan plan{};
  plan.group = static_cast<int>(std::clamp<int64_t>(2 * int64_t{blocks} / p.tiles(), 1, p.units));
  plan.groups = static_cast<int>(ceil_div(p.units, plan.group));
  const int64_t lines = int64_t{p.side} * std::max(p.tile_rows, p.tile_columns);
  const int64_t carries = ceil_div(a.directions * T::kChannels * lines, T::kThreads);
  const int64_t per_group = plan.group * (carries + 2 * p.tiles());
  if (per_group * (plan.groups + 1) > INT_MAX - (1 << 20))
    throw std::runtime_error("gatedrnn: the maps have more tiles than a call on a GPU can count");
  plan.carries = static_cast<int>(carries);
  plan.per_group = static_cast<int>(per_group);
  plan.tickets = plan.per_group * (plan.groups + 1);
  return plan;
}

}  // namespace

bool chunks_know(const ScanArgs& a) {
  return a.block == 1 && a.nonlinearity == Nonlinearity::kIdentity && a.dtype != Dtype::kFloat64 &&
         fits(ChunkTiles::bytes(a));
}

int64_t forward_by_chunks(const ScanArgs& a, void* memory, cudaStream_t stream) {
  Workspace workspace(memory);
  ChunkParams f{};
  f.a = a;
  f.p = plan_tiles(a, T::kSide, T::kChannels);
  const int64_t counters = 1 + 2 * int64_t{f.p.units};
  f.ticket = workspace.take<int>(counters);
  f.summed = f.ticket + 1;
  f.carried = f.summed + f.p.units;
  f.gains = take_borders<float>(workspace, a, f.p);
  f.states = take_borders<float>(workspace, a, f.p);
  if (workspace.counts_only()) return workspace.bytes();
  const size_t shared = ChunkTiles::bytes(a);
  const int most = resident_blocks(chunk_kernel, T::kThreads, shared, INT_MAX);
  f.plan = plan_chunks(a, f.p, most);
  check(cudaMemsetAsync(f.ticket, 0, counters * sizeof(int), stream), "cudaMemsetAsync");
  launch(chunk_kernel, dim3(static_cast<unsigned>(std::min(most, f.plan.tickets))),
         dim3(T::kThreads), shared, stream, f);
  check_launch("chunk_kernel");
  return workspace.bytes();
}

}  // namespace gatedrnn::cuda
