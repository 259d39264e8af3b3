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
  __syncthreads();
}
// For all threads: what they have written is there.
GATEDRNN_DEVICE void count_one(int* counter) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(counter, 1);
  }
}

// Tiles in shared memory: x; gates, of both axes where they differ; what an axis' directions merge
// to, and with a mask their winners, a byte each.
template <class T>
struct ChunkTiles {
  static constexpr int kTile = T::kChannels * T::kPlane;
  float* x;
  Pair<float> g, h;
  Pair<uint8_t> winners;
  GATEDRNN_DEVICE explicit ChunkTiles(const ScanArgs& a) {
    const int gate = a.gate_channels ? kTile : T::kPlane;
    x = shared_at<float>(kTilesBegin);
    g = {x + kTile, a.gate_directions ? gate : 0};
    h = {g[1] + gate, kTile};
    winners = {a.mask ? reinterpret_cast<uint8_t*>(h[1] + kTile) : nullptr, a.mask ? kTile : 0};
  }
  static int64_t planes(const ScanArgs& a) {
    return 3 * T::kChannels + gate_planes<T>(a) +
           (a.mask ? ceil_div(2 * T::kChannels, int64_t{sizeof(float)}) : 0);
  }
};

// Gain and offset of every line, channel and direction of a tile. Both directions of an axis walk
// a line once: the one that goes against it composes its map from the other end.
template <class T>
GATEDRNN_PART void sum_tile(const ChunkParams& f) {
  Task t = task_slot().task;
  const ChunkTiles<T> tiles(f.a);
  constexpr int R = T::kChannelsPerThread;
  const ScanArgs& a = f.a;
  const int gate_plane = a.gate_channels ? T::kPlane : 0;
  const int axis = threadIdx.x / (T::kThreads / 2);
  const typename T::Lane lane;
  const Path path = Path::of<T::kSide>(t, axis);  // along the line
  load_input<T>(whole_block<T>(), f.p, t, a, tiles.x);
#pragma unroll 1
  for (int pass = 0; pass < (a.gate_directions ? f.p.passes : 1); ++pass) {
    if (pass > 0) __syncthreads();  // all are done with the gates before
    t.pass = pass;
    load_gates<T>(f.p, t, a, tiles.g);
    __syncthreads();
    int along = -1, against = -1;
    for (int i = 0; i < f.p.passes; ++i)
      if (i == pass || !a.gate_directions)
        (f.p.from_end[i] ? against : along) = f.p.direction[i][axis];
    if (lane.line >= path.lines) continue;
    const typename T::Weights forth(a, t, along < 0 ? 0 : along, lane, false);
    const typename T::Weights back(a, t, against < 0 ? 0 : against, lane, false);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int c = lane.channel + r;
      if (c >= t.channels) break;
      float gain = 1, offset = 0, gain_back = 1, offset_back = 0;
      const int first = path.first<T::kSide>(lane.line);
      const float* x = tiles.x + c * T::kPlane + first;
      const float* g = tiles.g[axis] + c * gate_plane + first;
#pragma unroll 8
      for (int i = 0; i < path.length; ++i, x += path.step, g += path.step) {
        const float value = *x, gate = *g;
        offset = preactivation(value, gate, forth.bias[r] + forth.own[r][0] * offset);
        gain *= gate * forth.own[r][0];
        offset_back += gain_back * preactivation(value, gate, back.bias[r]);
        gain_back *= gate * back.own[r][0];
      }
      const int64_t at = f.p.border(t.n, t.c0 + c, t.cell, axis) + lane.line;
      if (along >= 0) {
        f.gains.states[along][at] = gain;
        f.states.states[along][at] = offset;
      }
      if (against >= 0) {
        f.gains.states[against][at] = gain_back;
        f.states.states[against][at] = offset_back;
      }
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

// A thread carries the state of one line and channel from chunk to chunk; lines are coalesced.
// `index` counts a unit's directions, channels and lines, T::kThreads at a time.
template <class T>
GATEDRNN_PART void carry_lines(const ChunkParams& f, int index) {
  const Task& t = task_slot().task;
  const int most = f.p.side * (f.p.tile_rows > f.p.tile_columns ? f.p.tile_rows : f.p.tile_columns);
  const int64_t i = int64_t{index} * T::kThreads + threadIdx.x;
  const int line = static_cast<int>(i % most), c = static_cast<int>(i / most % T::kChannels);
  const int d = static_cast<int>(i / most / T::kChannels);
  if (d < f.a.directions && c < t.channels) {
    const Direction direction = f.p.walks[d];
    const bool rows = direction.along_width;
    const int chunks = rows ? f.p.tile_columns : f.p.tile_rows;
    const int lines = f.p.side * (rows ? f.p.tile_rows : f.p.tile_columns);
    if (line < (rows ? f.a.h : f.a.w)) {
      const int64_t first = (t.n * f.a.c + t.c0 + c) * f.p.border_size() + line;
      const float* const gains = f.gains.states[d] + first;
      float* const states = f.states.states[d] + first;
      float h = 0;
      constexpr int ahead = 8;
      for (int k = 0; k < chunks; k += ahead) {
        float gain[ahead] = {}, offset[ahead] = {};  // see walk_planes
        const auto place = [&](int j) {
          return int64_t{direction.reverse ? chunks - 1 - k - j : k + j} * lines;
        };
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
              h = walk_chunk(f, d, t.n, t.c0 + c, line,
                             direction.reverse ? chunks - 1 - k - j : k + j, h);
            states[place(j)] = h;
          }
      }
    }
  }
  count_one(f.carried + t.unit);
}

// Scans a line of a tile and merges it, in place, with what was there before; `begins`: nothing
// was. x, g, h and winners are at the pixel that the path begins with. A few pixels are read at
// once, ahead of the recurrence.
template <bool Winners>
GATEDRNN_DEVICE void scan_line(const MergeRule<float, Winners>& merge, const Path& path, int d,
                               float weight, float bias, float state, bool begins, const float* x,
                               const float* g, float* h, uint8_t* winners) {
  constexpr int ahead = 8;
#pragma unroll 1
  for (int first = 0; first < path.length; first += ahead) {
    const auto place = [&](int k) { return (first + k) * path.step; };
    float value[ahead] = {}, gate[ahead] = {};  // see walk_planes
    Winner<float> before[ahead] = {};
#pragma unroll
    for (int k = 0; k < ahead; ++k)
      if (first + k < path.length) {
        value[k] = x[place(k)];
        gate[k] = g[place(k)];
        if (!begins) before[k] = {h[place(k)], Winners ? winners[place(k)] : 0u};
      }
#pragma unroll
    for (int k = 0; k < ahead; ++k)
      if (first + k < path.length) {
        state = preactivation(value[k], gate[k], bias + weight * state);
        Winner<float> v{state, 1u << d};
        if (!begins) v = merge(before[k], v);
        h[place(k)] = v.value;
        if (Winners) winners[place(k)] = static_cast<uint8_t>(v.bits);
      }
  }
}

// Scans a tile in all directions and writes what they merge to.
template <class T, bool Winners>
GATEDRNN_PART void scan_tile(const ChunkParams& f) {
  Task t = task_slot().task;
  const ChunkTiles<T> tiles(f.a);
  constexpr int R = T::kChannelsPerThread;
  const ScanArgs& a = f.a;
  const MergeRule<float, Winners> merge(a.merge == Merge::kMax);
  const float scale = merge_scale<float>(a);
  const bool merges = a.merge != Merge::kNone;
  const int gate_plane = a.gate_channels ? T::kPlane : 0;
  const int axis = threadIdx.x / (T::kThreads / 2);
  const typename T::Lane lane;
  bool rows = false, columns = false;  // whether a direction of that axis was there
  load_input<T>(whole_block<T>(), f.p, t, a, tiles.x);
#pragma unroll 1
  for (int pass = 0; pass < f.p.passes; ++pass) {
    t.pass = pass;
    t.from_end = f.p.from_end[pass];
    if (pass == 0 || a.gate_directions) {
      if (pass > 0) __syncthreads();  // all are done with the gates before
      load_gates<T>(f.p, t, a, tiles.g);
      __syncthreads();
    }
    const int d = f.p.direction[pass][axis];
    const Path path = Path::of<T::kSide>(t, axis);
    if (d >= 0 && lane.line < path.lines) {
      const typename T::Weights w(a, t, d, lane, false);
      const Border<float> border = Border<float>::of(f.p, t, f.states.states[d], axis, t.from_end);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int c = lane.channel + r, first = path.first<T::kSide>(lane.line);
        if (c >= t.channels) break;
        const int at = c * T::kPlane + first;
        scan_line(merge, path, d, w.own[r][0], w.bias[r], border.enter(c, lane.line),
                  !(axis == 0 ? rows : columns) || !merges, tiles.x + at,
                  tiles.g[axis] + c * gate_plane + first, tiles.h[axis] + at,
                  Winners ? tiles.winners[axis] + at : nullptr);
      }
    }
    rows |= f.p.direction[pass][0] >= 0;
    columns |= f.p.direction[pass][1] >= 0;
    if (merges) continue;
    __syncthreads();
    for (int i = 0; i < kAxes; ++i)
      if (const int one = f.p.direction[pass][i]; one >= 0)
        write_map<T>(whole_block<T>(), f.p, t, a, one, tiles.h[i]);
    __syncthreads();
  }
  if (!merges) return;
  __syncthreads();
  const auto merged = [&](int cell) {
    const auto of = [&](int i) {
      return Winner<float>{tiles.h[i][cell], Winners ? unsigned{tiles.winners[i][cell]} : 0u};
    };
    return rows && columns ? merge(of(0), of(1)) : of(rows ? 0 : 1);
  };
  const int64_t corner = tile_corner(f.p, t, a.y_strides, 0, t.c0);
  const Box box = box_of<T::kSide>(t, t.channels, a.y_strides);
  with_storage<float>(a.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    write_box<T>(whole_block<T>(), box, static_cast<S*>(a.y) + corner,
                 [&](int cell) { return to_storage<S>(merged(cell).value * scale); });
  });
  if constexpr (Winners)
    write_box<T>(whole_block<T>(), box, a.mask + corner,
                 [&](int cell) { return static_cast<uint8_t>(merged(cell).bits); });
}

// A block does a task at a time.
template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kChunkBlocks)
    chunk_kernel(const __grid_constant__ ChunkParams f) {
  const auto decode = [&](int ticket, Task& t) {
    const ChunkTask task = chunk_task(f, ticket);
    const bool tile = task.stage != ChunkStage::kCarry;
    const Cell cell{task.index / f.p.tile_columns, task.index % f.p.tile_columns};
    if (task.unit >= 0 && task.unit < f.p.units) t = f.p.task(task.unit, tile ? cell : Cell{0, 0});
  };
  for (Tickets tickets(f.ticket, f.plan.tickets, decode); tickets.next(); tickets.look_ahead()) {
    const ChunkTask task = chunk_task(f, task_slot().ticket);
    if (task.unit < 0 || task.unit >= f.p.units) continue;
    if (task.stage == ChunkStage::kSum) {
      sum_tile<T>(f);
    } else if (task.stage == ChunkStage::kCarry) {
      wait_count(f.summed + task.unit, f.p.tiles());
      carry_lines<T>(f, task.index);
    } else {
      wait_count(f.carried + task.unit, f.plan.carries);
      if (f.a.mask)
        scan_tile<T, true>(f);
      else
        scan_tile<T, false>(f);
    }
  }
}

template <class T>
void run(ChunkParams f, cudaStream_t stream) {
  const auto kernel = chunk_kernel<T>;
  const size_t shared = shared_bytes<T>(ChunkTiles<T>::planes(f.a));
  const int blocks = resident_blocks(kernel, T::kThreads, shared, f.plan.tickets);
  launch(kernel, dim3(blocks), dim3(T::kThreads), shared, stream, f);
  check_launch("chunk_kernel");
}

// Groups of as many units as keep the device busy: a block has some two tasks of each stage.
template <class T>
ChunkPlan plan_chunks(const ScanArgs& a, const TilePlan& p) {
  constexpr int blocks = 8;  // of a multiprocessor
  const int64_t most = 2 * blocks * device_attribute(cudaDevAttrMultiProcessorCount);
  ChunkPlan plan{};
  plan.group = static_cast<int>(std::clamp<int64_t>(most / p.tiles(), 1, p.units));
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

// Large tiles of one channel; where channels lie side by side in memory, small ones of eight.
using LargeTiles = Steps<float, 1, 32, 1, 1>;
using DeepTiles = Steps<float, 1, 16, 2>;

}  // namespace

bool chunks_know(const ScanArgs& a) {
  return a.block == 1 && a.nonlinearity == Nonlinearity::kIdentity && a.dtype != Dtype::kFloat64 &&
         fits<DeepTiles>(ChunkTiles<DeepTiles>::planes(a));
}

int64_t forward_by_chunks(const ScanArgs& a, void* memory, cudaStream_t stream) {
  Workspace workspace(memory);
  const auto with = [&]<class T>() {
    ChunkParams f{};
    f.a = a;
    f.p = plan_tiles(a, T::kSide, T::kChannels);
    f.plan = plan_chunks<T>(a, f.p);
    const int64_t counters = 1 + 2 * int64_t{f.p.units};
    f.ticket = workspace.take<int>(counters);
    f.summed = f.ticket + 1;
    f.carried = f.summed + f.p.units;
    f.gains = take_borders<float>(workspace, a, f.p);
    f.states = take_borders<float>(workspace, a, f.p);
    if (workspace.counts_only()) return;
    check(cudaMemsetAsync(f.ticket, 0, counters * sizeof(int), stream), "cudaMemsetAsync");
    run<T>(f, stream);
  };
  const bool channels_last = a.c > 1 && a.x_strides.c == 1;
  if (!channels_last && fits<LargeTiles>(ChunkTiles<LargeTiles>::planes(a)))
    with.template operator()<LargeTiles>();
  else
    with.template operator()<DeepTiles>();
  return workspace.bytes();
}

}  // namespace gatedrnn::cuda
