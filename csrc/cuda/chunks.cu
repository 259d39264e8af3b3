// Forward pass by chunks, for diagonal weights and theta = identity. A channel's recurrence is then
// h_out = gain * h_in + offset along any chunk of a line, and such maps compose: the chunks of a
// line, one to a tile, are summed up side by side, then their states are carried through, and then
// every tile is scanned in all directions in one visit. Nothing waits.
#include "cuda/forward.h"
#include "cuda/merge.h"

namespace gatedrnn::cuda {
namespace {

struct ChunkParams {
  ScanArgs a;
  TilePlan p;
  Borders<float> gains, states;  // states: offsets, until they are carried through
};

GATEDRNN_DEVICE Task tile_of_block(const TilePlan& p) {
  const int block = blockIdx.x, tile = block % p.tiles();
  return p.task(block / p.tiles(), {tile / p.tile_columns, tile % p.tile_columns});
}

// Gates of a pass are loaded anew only where directions have their own.
template <class T>
GATEDRNN_DEVICE void load_pass(const ChunkParams& f, Task& t, int pass, const Pair<float>& g) {
  t.pass = pass;
  t.from_end = f.p.from_end[pass];
  if (pass == 0 || f.a.gate_directions) load_gates<T::kSide>(f.p, t, f.a, g);
  __syncthreads();
}

// A block owns a tile; its threads are those of steps.h. Gain and offset of every line, channel and
// direction. Shared memory: tiles of x and g.
template <class T>
__global__ void __launch_bounds__(T::kThreads, 2)
    chunk_sums_kernel(const __grid_constant__ ChunkParams f) {
  constexpr int R = T::kChannelsPerThread, plane = T::kPlane, tile = T::kChannels * plane;
  const ScanArgs& a = f.a;
  float* const x = reinterpret_cast<float*>(dynamic_shared_memory() + 16);
  const int gate_plane = a.gate_channels ? plane : 0;
  const Pair<float> g{x + tile, a.gate_directions ? (a.gate_channels ? tile : plane) : 0};
  const int axis = threadIdx.x / (T::kThreads / 2);
  Task t = tile_of_block(f.p);
  load_input<T::kSide>(Team::block(), f.p, t, a, x);
  const typename T::Lane lane;
  for (int pass = 0; pass < f.p.passes; ++pass) {
    if (pass > 0 && a.gate_directions) __syncthreads();  // all are done with the gates before
    load_pass<T>(f, t, pass, g);
    const int d = f.p.direction[pass][axis];
    const Path path = Path::of<T::kSide>(t, axis);
    if (d < 0 || lane.line >= path.lines) continue;
    const typename T::Weights w(a, t, d, lane, false);
    for (int r = 0; r < R; ++r) {
      const int c = lane.channel + r;
      if (c >= t.channels) break;
      float gain = 1, offset = 0;
      int cell = path.first<T::kSide>(lane.line);
      for (int i = 0; i < path.length; ++i, cell += path.step) {
        const float gate = g[axis][c * gate_plane + cell];
        offset = preactivation(x[c * plane + cell], gate, w.bias[r] + w.own[r][0] * offset);
        gain *= gate * w.own[r][0];
      }
      const int64_t at = f.p.border(t.n, t.c0 + c, t.cell, axis) + lane.line;
      f.gains.states[d][at] = gain;
      f.states.states[d][at] = offset;
    }
  }
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
constexpr int kCarryThreads = 128;
__global__ void __launch_bounds__(kCarryThreads)
    chunk_carry_kernel(const __grid_constant__ ChunkParams f) {
  const int d = blockIdx.y;
  const Direction direction = f.p.walks[d];
  const int axis = direction.along_width ? 0 : 1;
  const int chunks = axis == 0 ? f.p.tile_columns : f.p.tile_rows;
  const int64_t lines = f.p.border_size() / chunks;
  const int64_t i = int64_t{blockIdx.x} * kCarryThreads + threadIdx.x;
  if (i >= f.a.n * f.a.c * lines || i % lines >= (axis == 0 ? f.a.h : f.a.w)) return;
  const int64_t first = i / lines * f.p.border_size() + i % lines;
  const float* const gains = f.gains.states[d] + first;
  float* const states = f.states.states[d] + first;
  float h = 0;
#pragma unroll 8
  for (int k = 0; k < chunks; ++k) {
    const int64_t at = (direction.reverse ? chunks - 1 - k : k) * lines;
    const float gain = gains[at], offset = states[at];
    // Between pixels a product may overflow that a closed gate would have stopped.
    if (is_finite(gain) && is_finite(offset) && is_finite(h))
      h = offset + gain * h;
    else
      h = walk_chunk(f, d, i / lines / f.a.c, i / lines % f.a.c, i % lines,
                     direction.reverse ? chunks - 1 - k : k, h);
    states[at] = h;
  }
}

// A block owns a tile and scans it in all directions. Shared memory: tiles of x and g, of h for
// rows and for columns, of the merged map so far and of its winners.
template <class T>
__global__ void __launch_bounds__(T::kThreads, 2)
    chunk_scan_kernel(const __grid_constant__ ChunkParams f) {
  constexpr int tile = T::kChannels * T::kPlane;
  const ScanArgs& a = f.a;
  const MergeRule<float> merge(a);
  float* const x = reinterpret_cast<float*>(dynamic_shared_memory() + 16);
  float* const merged = x + tile;
  const Pair<float> h{x + 2 * tile, tile};
  const Pair<float> g{x + 4 * tile, a.gate_directions ? (a.gate_channels ? tile : T::kPlane) : 0};
  uint8_t* const winners = reinterpret_cast<uint8_t*>(g[1] + (a.gate_channels ? tile : T::kPlane));
  const int axis = threadIdx.x / (T::kThreads / 2);
  Task t = tile_of_block(f.p);
  const Box box = box_of<T::kSide>(t, t.channels, a.y_strides);
  load_input<T::kSide>(Team::block(), f.p, t, a, x);
  for (int pass = 0; pass < f.p.passes; ++pass) {
    load_pass<T>(f, t, pass, g);
    const int d = f.p.direction[pass][axis];
    Border<float> border{};
    if (d >= 0) border = Border<float>::of(f.p, t, f.states.states[d], axis, t.from_end);
    border.out = nullptr;  // they are there
    T::scan(a, t, d, Path::of<T::kSide>(t, axis),
            ScanTiles<float>{x, g[axis], a.gate_channels ? T::kPlane : 0, h[axis]}, border);
    __syncthreads();
    if (a.merge == Merge::kNone) {
      for (int i = 0; i < kAxes; ++i)
        if (const int one = f.p.direction[pass][i]; one >= 0)
          write_map<T::kSide>(Team::block(), f.p, t, a, one, h[i]);
    } else if (pass + 1 < f.p.passes) {
      for_each_element(Team::block(), box, [&](int64_t, int cell) {
        const Winner<float> v = merge.pass(f.p.direction[pass], h, cell);
        merged[cell] = v.value;
        winners[cell] = static_cast<uint8_t>(v.bits);
      });
    } else {
      const int64_t corner = tile_corner(f.p, t, a.y_strides, 0, t.c0);
      with_storage<float>(a.dtype, [&](auto* type) {
        using S = std::remove_pointer_t<decltype(type)>;
        S* const y = static_cast<S*>(a.y) + corner;
        for_each_element(Team::block(), box, [&](int64_t at, int cell) {
          Winner<float> v = merge.pass(f.p.direction[pass], h, cell);
          if (pass > 0) v = merge(v, {merged[cell], winners[cell]});
          y[at] = to_storage<S>(v.value * merge.scale);
          if (a.mask) a.mask[corner + at] = static_cast<uint8_t>(v.bits);
        });
      });
    }
  }
}

template <class T>
void run(ChunkParams f, cudaStream_t stream) {
  const int gates = (f.a.gate_directions ? 2 : 1) * (f.a.gate_channels ? T::kChannels : 1);
  const dim3 tiles(static_cast<unsigned>(f.p.units * f.p.tiles())), threads(T::kThreads);
  const auto start = [&](auto kernel, int planes, const char* name) {
    const size_t shared = shared_bytes<T>(planes);
    allow_shared_memory(kernel, shared);
    launch(kernel, tiles, threads, shared, stream, f);
    check_launch(name);
  };
  start(chunk_sums_kernel<T>, T::kChannels + gates, "chunk_sums_kernel");
  const int64_t lines = f.a.n * f.a.c * f.p.side * std::max(f.p.tile_rows, f.p.tile_columns);
  launch(chunk_carry_kernel,
         dim3(static_cast<unsigned>(ceil_div(lines, kCarryThreads)),
              static_cast<unsigned>(f.a.directions)),
         dim3(kCarryThreads), 0, stream, f);
  check_launch("chunk_carry_kernel");
  start(chunk_scan_kernel<T>, 4 * T::kChannels + gates + T::kChannels / 4, "chunk_scan_kernel");
}

// Large tiles of four channels; where channels lie side by side in memory, small ones of eight.
using LargeTiles = Steps<float, 1, 32, 1, 4>;
using DeepTiles = Steps<float, 1, 16, 2>;

template <class T>
int64_t most_planes(const ScanArgs& a) {
  return 4 * T::kChannels + T::kChannels / 4 + 2 * (a.gate_channels ? T::kChannels : 1);
}

}  // namespace

bool chunks_know(const ScanArgs& a) {
  return a.block == 1 && a.nonlinearity == Nonlinearity::kIdentity && a.dtype != Dtype::kFloat64 &&
         fits<DeepTiles>(most_planes<DeepTiles>(a));
}

int64_t forward_by_chunks(const ScanArgs& a, void* memory, cudaStream_t stream) {
  Workspace workspace(memory);
  const auto with = [&]<class T>() {
    ChunkParams f{a, plan_tiles(a, T::kSide, T::kChannels), {}, {}};
    f.gains = take_borders<float>(workspace, a, f.p);
    f.states = take_borders<float>(workspace, a, f.p);
    if (!workspace.counts_only()) run<T>(f, stream);
  };
  const bool channels_last = a.c > LargeTiles::kChannels && a.x_strides.c == 1;
  if (!channels_last && fits<LargeTiles>(most_planes<LargeTiles>(a)))
    with.template operator()<LargeTiles>();
  else
    with.template operator()<DeepTiles>();
  return workspace.bytes();
}

}  // namespace gatedrnn::cuda
