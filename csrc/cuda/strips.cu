// Forward pass by strips, for few lines, where only the latency of a line counts. All directions
// run at once. Loads and stores overlap with the recurrence.
#include "cuda/forward.cuh"
#include "cuda/merge.cuh"

namespace gatedrnn::cuda {
namespace {

struct StripParams {
  ScanArgs a;
  TilePlan p;
  float* maps;  // of several directions, each laid out as y; null if the result goes to y directly
};

// The carry of a strip, in shared memory. Each value is written and read by one thread.
struct CarriedBorder {
  float* carried;
  bool first;
  template <int W>
  GATEDRNN_DEVICE Pack<float, W> load_carry(int at) const {
    return first ? Pack<float, W>{} : pack_at<W>(carried + at);
  }
  template <int W>
  GATEDRNN_DEVICE void store_carry(int at, const Pack<float, W>& states) const {
    pack_at<W>(carried + at) = states;
  }
};

GATEDRNN_INLINE int strips_of(const TilePlan& p, bool along_width) {
  return along_width ? p.tile_rows : p.tile_columns;
}

// A block owns a strip of lines in one direction, and walks along it tile by tile. Some threads
// scan a tile. The others load the next tile and store the last one, coalesced as in the wavefront
// kernel. Shared memory: two tiles each of x, g and h. States are float.
template <class T>
constexpr int kScanners = T::kThreads / 2 < 32 ? 32 : T::kThreads / 2;  // whole warps
constexpr int kMovers = 128;
template <class T>
__global__ void __launch_bounds__(kScanners<T> + kMovers, 1)
    strip_kernel(const __grid_constant__ StripParams f) {
  constexpr int tile = T::kTile;
  const ScanArgs& a = f.a;
  const int d = blockIdx.y;
  const Direction direction = f.p.walks[d];
  const int axis = direction.along_width ? 0 : 1;
  const int strips = strips_of(f.p, direction.along_width), block = blockIdx.x;
  const int unit = block / strips, strip = block % strips;
  if (unit >= f.p.units) return;
  const int count = axis == 0 ? f.p.tile_columns : f.p.tile_rows;

  float* const memory = shared_at<float>(kTilesBegin);
  const PerAxis<float> x{memory, tile}, h{memory + 2 * tile, tile}, g{memory + 4 * tile, tile};
  float* const carried = memory + 6 * tile;
  const bool scans = threadIdx.x < kScanners<T>;
  const ThreadGroup<kMovers> movers{static_cast<int>(threadIdx.x) - kScanners<T>};
  const auto tile_at = [&](int i) {
    if (direction.reverse) i = count - 1 - i;
    Task t = f.p.task(unit, axis == 0 ? Cell{strip, i} : Cell{i, strip});
    t.from_end = direction.reverse;
    return t;
  };

  // Half of the lanes of a warp may have no line.
  typename T::Lane lane(threadIdx.x, threadIdx.x < T::kThreads / 2);
  const Task start = tile_at(0);
  if (lane.line >= (axis == 0 ? start.rows : start.columns)) lane.is_there = false;
  const typename T::Weights weights(a, start, d, lane);
  for (int i = 0; i < count + 2; ++i) {
    const int now = i % 2;
    if (scans && i >= 1 && i <= count)
      T::scan(a, LineWalk::of<T::kSide>(tile_at(i - 1), axis),
              ScanTiles<float>{x[1 - now], g[1 - now], tile, h[1 - now]},
              CarriedBorder{carried, i == 1}, lane, weights);
    if (!scans && i < count)
      load_inputs<T>(movers, f.p, tile_at(i), a, {d, -1}, x[now], {g[now], 0});
    if (!scans && i >= 2) {
      const Task t = tile_at(i - 2);
      if (f.maps) {
        float* const map =
            f.maps + d * a.n * a.c * a.h * a.w + tile_corner(f.p, t, a.y_strides, 0, t.c0);
        write_tile<T>(movers, t, a.y_strides, map, [&](int cell) { return h[now][cell]; });
      } else {
        write_map<T>(movers, f.p, t, a, d, h[now]);
      }
    }
    __syncthreads();
  }
}

// A thread merges one element of the maps, coalesced. The maps are dense, with the layout of y and
// the mask.
constexpr int kMergeThreads = 256;
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const __grid_constant__ ScanArgs a, const float* maps) {
  const int64_t count = a.n * a.c * a.h * a.w;
  const int64_t i = int64_t{blockIdx.x} * kMergeThreads + threadIdx.x;
  if (i >= count) return;
  const float scale = merge_scale<float>(a);
  ArgMax<float> v{maps[i], 1};
  dispatch_merge_op(merge_op(a), [&]<MergeOp Op>() {
    for (int d = 1; d < a.directions; ++d) v = merged<Op>(v, {maps[d * count + i], 1u << d});
  });
  dispatch_storage<float>(a.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    static_cast<S*>(a.y)[i] = to_storage<S>(v.value * scale);
  });
  if (a.mask) a.mask[i] = static_cast<uint8_t>(v.bits);
}

// Two tiles each of x, h and g, and the carries.
template <class T>
size_t strip_bytes() {
  return (6 * T::kTile + T::kSide * T::kChannels) * sizeof(float) + kTilesBegin;
}

template <class Body>
bool choose_strips(const ScanArgs& a, const Body& body) {
  const auto bytes = [&]<class T>() { return strip_bytes<T>(); };
  return a.dtype != Dtype::kFloat64 && choose_known_traits(a, bytes, body);
}

}  // namespace

bool can_use_strips(const ScanArgs& a) {
  return choose_strips(a, [&]<class T>() { static_cast<void>(a); });
}

int64_t strip_count(const ScanArgs& a) {
  int64_t count = 0;
  choose_strips(a, [&]<class T>() {
    const TilePlan p = plan_tiles(a, T::kSide, T::kChannels);
    for (int d = 0; d < a.directions; ++d)
      count += int64_t{p.units} * strips_of(p, p.walks[d].along_width);
  });
  return count;
}

int64_t forward_by_strips(const ScanArgs& a, void* memory, cudaStream_t stream) {
  Workspace workspace(memory);
  choose_strips(a, [&]<class T>() {
    const bool merges = a.merge != Merge::kNone && (a.directions > 1 || a.mask);
    const int64_t count = a.n * a.c * a.h * a.w;
    StripParams f{a, plan_tiles(a, T::kSide, T::kChannels), nullptr};
    f.maps = workspace.take<float>(merges ? a.directions * count : 1);
    if (workspace.counts_only()) return;
    if (!merges) f.maps = nullptr;
    const auto kernel = strip_kernel<T>;
    const size_t shared = strip_bytes<T>();
    allow_shared_memory(kernel);
    const int strips = f.p.units * std::max(f.p.tile_rows, f.p.tile_columns);
    launch(kernel, dim3(static_cast<unsigned>(strips), static_cast<unsigned>(a.directions)),
           dim3(kScanners<T> + kMovers), shared, stream, f);
    check_launch("strip_kernel");
    if (!merges) return;
    launch(merge_kernel, dim3(static_cast<unsigned>(ceil_div(count, kMergeThreads))),
           dim3(kMergeThreads), 0, stream, a, static_cast<const float*>(f.maps));
    check_launch("merge_kernel");
  });
  return workspace.bytes();
}

}  // namespace gatedrnn::cuda
