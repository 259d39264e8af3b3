// Forward pass by chunks, for diagonal weights and theta = identity. A channel's recurrence is then
// h_out = gain * h_in + offset along any chunk of a line, and such maps compose: the chunks of a
// line, one to a tile, are summed up side by side, then their states are carried through, and then
// every tile is scanned in all directions in one visit.
//
// One kernel does all three, a group of units after the other: while a group is scanned, the next
// one is summed up. What is read twice, x and g, is thus found in the L2 cache the second time.
//
// A unit is eight channels of an image, as many as a thread keeps. Of dense maps it is one channel,
// whose rows are read as eight *pieces*: the pieces of a tile lie side by side, and stand where the
// channels of a tile stand otherwise. A unit is then an eighth as large, so that more of it stays
// in the cache, and no thread idles for want of channels.
#include "cuda/forward.h"
#include "cuda/merge.h"

namespace gatedrnn::cuda {
namespace {

using T = KnownSteps<1>;
constexpr int kPieces = T::kChannels;

// Tickets: for every group the carries of the group before, the sums of this one, and the scans of
// the group before. Each waits for smaller tickets only, as wavefront.h asks for.
struct ChunkPlan {
  int group, groups;  // units in a group; the last one may be smaller
  int chains;         // lines whose states a thread carries: of a unit and direction, at most
  int carries;        // tasks of a unit: a warp of chains each
  int tickets;
  Divisor by_group, by_carries, by_tiles, by_columns;  // tickets of a group; tasks of a unit
};

struct ChunkParams {
  ScanArgs a;
  TilePlan p;
  ChunkPlan plan;
  int channels;  // of the maps whose pieces `a` tells of as its channels; 0: there are no pieces
  int* ticket;
  int *summed, *carried;  // tasks done of each unit
  // Of every chunk of a line its gain, and its offset until the state is there that enters it.
  Borders<float> gains, states;
};

enum class ChunkStage { kCarry, kSum, kScan };
struct ChunkTask {
  ChunkStage stage;
  int unit, index;  // of a tile, or of a carry; there is no such unit in what a group lacks
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
    h = {x + tile, tile};
    g = {x + 3 * tile, a.gate_directions ? tile : 0};
    winners = {reinterpret_cast<uint8_t*>(g[1] + tile), tile};
  }
  static size_t bytes(const ScanArgs& a) {
    return shared_bytes<T>(a, 3) + (a.mask ? 2 * T::kTile : 0);
  }
};

using Values = float[T::kChannels];  // a pixel's, or a line's, in one thread

// The place of a tile's lines among states or gains.
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
  for (int k = 0; k < kPieces; ++k) {
    one.w[k][0] = static_cast<const float*>(f.a.weight)[at];
    one.bias[k] = f.a.bias ? static_cast<const float*>(f.a.bias)[at] : 0;
  }
  return one;
}

// Gain and offset of every line, channel and direction of a tile. Both directions of an axis walk
// a line once: the one that goes against it composes its map from the other end.
GATEDRNN_DEVICE void sum_tile(const ChunkParams& f) {
  Task t = task_slot().task;
  const ChunkTiles tiles(f.a);
  const ScanArgs& a = f.a;
  const int axis = threadIdx.x / (T::kThreads / 2);
  const Path path = Path::of<T::kSide>(t, axis);  // along the line
  T::Lane lane;
  lane.is_there = lane.line < path.lines;
  const Ticket<T> ticket(f.ticket);
#pragma unroll 1
  for (int pass = 0; pass < (a.gate_directions ? f.p.passes : 1); ++pass) {
    if (pass > 0) meet<T>();  // all are done with the gates before
    t.pass = pass;
    load_inputs<T>(whole_block<T>(), f.p, t, a, f.p.direction[pass], tiles.x, tiles.g);
    if (pass == 0) ticket.keep();
    meet<T>();
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
// NaN, or infinity, of what is finite. `c` is a channel, or a piece.
GATEDRNN_APART float walk_chunk(const ChunkParams& f, int d, int64_t n, int64_t c, int64_t line,
                                int chunk, float h) {
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
    line += line / side * (f.p.pitch - side);  // other pieces lie between
  }
  const int64_t x_line = n * a.x_strides.n + c * x.c + line * x.l;
  const int64_t g_line = n * a.g_strides.n + (a.gate_directions ? d * a.g_strides.d : 0) +
                         (a.gate_channels ? c * g.c : 0) + line * g.l;
  const int64_t at = f.channels ? d * f.channels + n % f.channels : d * a.c + c;
  const float w = static_cast<const float*>(a.weight)[at];
  const float b = a.bias ? static_cast<const float*>(a.bias)[at] : 0;
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

// A chain of chunks, W of which lie side by side: leaves before each the state that enters it.
// place(i) is the first of W; walk(i, h) is h behind chunk i, pixel by pixel.
template <int W, class Place, class Walk>
GATEDRNN_DEVICE void carry_chain(const float* gains, float* states, int count, bool from_end,
                                 const Place& place, const Walk& walk) {
  constexpr int ahead = 16 / W;  // of W chunks each, whose loads are under way at once
  float h = 0;
  for (int k = 0; k < count; k += ahead) {
    Pack<float, W> gain[ahead] = {}, state[ahead] = {};  // see walk_places
    const auto number = [&](int j) { return from_end ? count - 1 - k - j : k + j; };
#pragma unroll
    for (int j = 0; j < ahead; ++j)
      if (k + j < count) {
        gain[j] = load_shared_by_blocks(&pack_at<W>(gains + place(number(j))));
        state[j] = load_shared_by_blocks(&pack_at<W>(states + place(number(j))));
      }
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      if (k + j >= count) continue;
#pragma unroll
      for (int i = 0; i < W; ++i) {
        // Not an index that is known only at run time, which would put the packs into memory.
        const auto pass = [&](float factor, float& place_of_state, int at) {
          const float offset = place_of_state, entering = h;
          // Between pixels a product may overflow that a closed gate would have stopped.
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

// A thread carries the state of a chain from chunk to chunk, its neighbours those beside in memory:
// a line of a channel, or of a piece, and of rows in pieces the line of all of them. `index` counts
// a unit's directions and chains, T::kThreads at a time.
GATEDRNN_DEVICE void carry_lines(const ChunkParams& f, int index) {
  const Task& t = task_slot().task;
  const Ticket<T> ticket(f.ticket);
  const int i = index * T::kThreads + static_cast<int>(threadIdx.x);
  const int d = i / f.plan.chains, chain = i % f.plan.chains;
  if (d < f.a.directions) {
    const Direction direction = f.p.walks[d];
    const bool rows = direction.along_width, joined = rows && f.channels > 0;
    const int tiles = rows ? f.p.tile_columns : f.p.tile_rows;
    const int lines = f.p.side * (rows ? f.p.tile_rows : f.p.tile_columns);
    const int line = joined ? chain : chain / T::kChannels, c = joined ? 0 : chain % T::kChannels;
    if (line < (rows ? f.a.h : f.a.w) && c < t.channels) {
      const int64_t first = t.unit * f.p.border_size() + int64_t{line} * T::kChannels + c;
      const float* const gains = f.gains.states[d] + first;
      float* const states = f.states.states[d] + first;
      const int64_t apart = int64_t{lines} * T::kChannels;
      if (joined)
        carry_chain<kPack>(
            gains, states, tiles * (kPieces / kPack), direction.reverse,
            [&](int k) { return k / (kPieces / kPack) * apart + k % (kPieces / kPack) * kPack; },
            [&](int chunk, float h) {
              return walk_chunk(f, d, t.n, chunk % kPieces, line, chunk / kPieces, h);
            });
      else
        carry_chain<1>(
            gains, states, tiles, direction.reverse, [&](int k) { return k * apart; },
            [&](int chunk, float h) { return walk_chunk(f, d, t.n, t.c0 + c, line, chunk, h); });
    }
  }
  ticket.keep();
  count_one(f.carried + t.unit);
}

// Scans the lines of a tile in direction d, and merges them, in place, with what the axis' other
// direction has left, if `Merges`.
template <Rule R, bool Merges>
GATEDRNN_DEVICE void scan_lines(const ChunkParams& f, const Task& t, int d, const Path& path,
                                const T::Lane& lane, const ChunkTiles& tiles) {
  constexpr bool has_winners = R == Rule::kMaxWithWinners;
  const T::Weights w = weights_of(f, t, d, lane);
  Values h, x, g, before = {};
  uint8_t winners[T::kChannels] = {};
  T::enter(border_of(f, t, f.states.states[d], path.axis), lane, h);
  const auto fetch = [&](int at) {
    T::get(tiles.x, at, x);
    T::get(tiles.g[path.axis], at, g);
    if (Merges) T::get(tiles.h[path.axis], at, before);
    if (Merges && has_winners) T::get(tiles.winners[path.axis], at, winners);
  };
  T::walk(path, lane, fetch, [&](int here, int next, bool has_next) {
    Values left;
#pragma unroll
    for (int c = 0; c < T::kChannels; ++c) {
      h[c] = preactivation(x[c], g[c], w.bias[c] + w.w[c][0] * h[c]);
      Winner<float> v{h[c], 1u << d};
      if (Merges) v = merged<R>(Winner<float>{before[c], winners[c]}, v);
      left[c] = v.value;
      winners[c] = static_cast<uint8_t>(v.bits);
    }
    T::put(tiles.h[path.axis], here, left);
    if (has_winners) T::put(tiles.winners[path.axis], here, winners);
    if (has_next) fetch(next);
  });
}

// Writes what the axes merge to; `rows` and `columns`: whether one has a direction.
template <Rule R>
GATEDRNN_DEVICE void write_axes(const ChunkParams& f, const Task& t, const ChunkTiles& tiles,
                                bool rows, bool columns) {
  constexpr bool has_winners = R == Rule::kMaxWithWinners;
  const ScanArgs& a = f.a;
  const float scale = merge_scale<float>(a);
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

// Scans a tile in all directions and writes what they merge to.
GATEDRNN_DEVICE void scan_tile(const ChunkParams& f) {
  Task t = task_slot().task;
  const ChunkTiles tiles(f.a);
  const ScanArgs& a = f.a;
  const bool merges = a.merge != Merge::kNone;
  const int axis = threadIdx.x / (T::kThreads / 2);
  T::Lane lane;
  bool rows = false, columns = false;  // whether a direction of that axis was there
  const Ticket<T> ticket(f.ticket);
#pragma unroll 1
  for (int pass = 0; pass < f.p.passes; ++pass) {
    t.pass = pass;
    t.from_end = f.p.from_end[pass];
    if (pass == 0 || a.gate_directions) {
      if (pass > 0) meet<T>();  // all are done with the gates before
      load_inputs<T>(whole_block<T>(), f.p, t, a, f.p.direction[pass], tiles.x, tiles.g);
      if (pass == 0) ticket.keep();
      meet<T>();
    }
    const int d = f.p.direction[pass][axis];
    const Path path = Path::of<T::kSide>(t, axis);
    lane.is_there = d >= 0 && lane.line < path.lines;
    if (lane.is_there)
      with_rule(rule_of(a), [&]<Rule R>() {
        if (merges && (axis == 0 ? rows : columns))
          scan_lines<R, true>(f, t, d, path, lane, tiles);
        else
          scan_lines<R, false>(f, t, d, path, lane, tiles);
      });
    rows |= f.p.direction[pass][0] >= 0;
    columns |= f.p.direction[pass][1] >= 0;
    if (merges) continue;
    meet<T>();
#pragma unroll 1
    for (int i = 0; i < kAxes; ++i)
      if (const int one = f.p.direction[pass][i]; one >= 0)
        write_map<T>(whole_block<T>(), f.p, t, a, one, tiles.h[i]);
    meet<T>();
  }
  if (!merges) return;
  meet<T>();
  with_rule(rule_of(a), [&]<Rule R>() { write_axes<R>(f, t, tiles, rows, columns); });
}

// A block does a task at a time.
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
      wait_count(f.summed + task.unit, f.p.tiles());
      carry_lines(f, task.index);
    } else {
      wait_count(f.carried + task.unit, f.plan.carries);
      scan_tile(f);
    }
  }
}

// Groups of as many units as keep the device busy: a block has some two tasks of each stage. But
// what is read twice, of two groups, should stay in the L2 cache.
ChunkPlan plan_chunks(const ChunkParams& f, int blocks) {
  const TilePlan& p = f.p;
  const int64_t unit_bytes =
      int64_t{p.tiles()} * p.side * p.side * p.channels * bytes_of(f.a.dtype);
  const int64_t held = device_attribute(cudaDevAttrL2CacheSize) / (5 * unit_bytes);
  ChunkPlan plan{};
  plan.group = static_cast<int>(
      std::clamp<int64_t>(std::min(2 * int64_t{blocks} / p.tiles(), held), 1, p.units));
  plan.groups = static_cast<int>(ceil_div(p.units, plan.group));
  const int64_t rows = int64_t{p.side} * p.tile_rows * (f.channels ? 1 : T::kChannels);
  const int64_t columns = int64_t{p.side} * p.tile_columns * T::kChannels;
  const int64_t chains = std::max(rows, columns);
  const int64_t carries = ceil_div(f.a.directions * chains, T::kThreads);
  const int64_t per_group = plan.group * (carries + 2 * p.tiles());
  if (per_group * (plan.groups + 1) > INT_MAX - (1 << 20))
    throw std::runtime_error("gatedrnn: the maps have more tiles than a call on a GPU can count");
  plan.chains = static_cast<int>(chains);
  plan.carries = static_cast<int>(carries);
  plan.tickets = static_cast<int>(per_group) * (plan.groups + 1);
  plan.by_group = Divisor(static_cast<int>(per_group));
  plan.by_carries = Divisor(plan.carries);
  plan.by_tiles = Divisor(p.tiles());
  plan.by_columns = Divisor(p.tile_columns);
  return plan;
}

// Whether the channels of all images of a map lie one after another, rows without a gap inside.
bool is_dense(const ScanArgs& a, const Strides& s) {
  return s.w == 1 && (a.n == 1 || a.c == 1 || s.n == a.c * s.c);
}

// The maps of `a`, where they are dense: each channel an image, its pieces the channels.
bool has_pieces(const ScanArgs& a) {
  const bool gate_alike =
      !a.g || (a.gate_channels && !a.gate_directions && is_dense(a, a.g_strides));
  return a.w % (kPieces * T::kSide) == 0 && a.merge != Merge::kNone && gate_alike &&
         is_dense(a, a.x_strides) && is_dense(a, a.y_strides);
}
ScanArgs in_pieces(ScanArgs a) {
  for (Strides* s : {&a.x_strides, &a.g_strides, &a.y_strides}) {
    if (a.c > 1) s->n = s->c;
    s->c = T::kSide * s->w;
  }
  a.n *= a.c;
  a.c = kPieces;
  a.w /= kPieces;
  return a;
}

}  // namespace

bool chunks_know(const ScanArgs& a) {
  return a.block == 1 && a.nonlinearity == Nonlinearity::kIdentity && a.dtype != Dtype::kFloat64 &&
         fits(ChunkTiles::bytes(a));
}

int64_t forward_by_chunks(const ScanArgs& a, void* memory, cudaStream_t stream) {
  Workspace workspace(memory);
  ChunkParams f{};
  const bool pieces = has_pieces(a);
  f.channels = pieces ? static_cast<int>(a.c) : 0;
  f.a = pieces ? in_pieces(a) : a;
  f.p = plan_tiles(f.a, T::kSide, T::kChannels);
  if (pieces) f.p.pitch = kPieces * T::kSide;
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
