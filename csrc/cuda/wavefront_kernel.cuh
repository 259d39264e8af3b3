// The wavefront kernel. A visit to a tile loads x and g once for two directions, and merges these
// on chip. Two passes cross the image from opposite corners at the same time.
#pragma once

#include "cuda/forward.cuh"
#include "cuda/merge.cuh"
#include "cuda/tasks.cuh"

namespace gatedrnn::cuda {

// What a visit writes for a tile, and what it reads from the visit before.
template <class A>
struct MergedTile {
  void* result;  // corner of y, or of the share on a first visit
  const void* share;
  uint8_t* mask;
  Dtype dtype;
  A scale;
};

// Merges the directions of one pass, and the result of the first visit if this is the second.
template <class T, MergeOp Op, bool Second>
GATEDRNN_DEVICE void write_merged(const Task& t, const MergedTile<typename T::Value>& tile,
                                  const Strides& strides, const PassMaps<typename T::Value>& maps) {
  using A = typename T::Value;
  constexpr bool has_argmax = Op == MergeOp::kMaxWithArgMax;
  dispatch_storage<A>(tile.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using Left = std::conditional_t<Op == MergeOp::kMax, S, A>;
    S* const result = static_cast<S*>(tile.result);
    dispatch_layout<T>(
        whole_block<T>(), t, t.channels, strides, result,
        [&]<int W>(int next, const auto& for_each) {
          struct Before {
            Pack<Left, W> value;
            Pack<uint8_t, W> argmax;
          };
          const auto write = [&](int64_t at, int cell, const Before& before) {
            const Pack<A, W> row = load_cells<W>(maps.row, cell, next);
            const Pack<A, W> column = load_cells<W>(maps.column, cell, next);
            Pack<S, W> values;
            Pack<uint8_t, W> argmax;
#pragma unroll
            for (int k = 0; k < W; ++k) {
              ArgMax<A> v{row.values[k], maps.row_bit};
              if (Op != MergeOp::kSum || opaque_bool(maps.both))
                v = merged<Op>(v, {column.values[k], maps.column_bit});
              if (Second)
                v = merged<Op>(v, {to_state<A>(before.value.values[k]),
                                   has_argmax ? before.argmax.values[k] : 0u});
              values.values[k] =
                  to_storage<S>(Op == MergeOp::kSum ? v.value * tile.scale : v.value);
              argmax.values[k] = static_cast<uint8_t>(v.bits);
            }
            pack_at<W>(result + at) = values;
            if (has_argmax) pack_at<W>(tile.mask + at) = argmax;
          };
          if constexpr (Second) {
            for_each(
                [&](int64_t at) {
                  const Left* const share = static_cast<const Left*>(tile.share);
                  Before before{load_bypass_l1(&pack_at<W>(share + at)), {}};
                  if (has_argmax) before.argmax = load_bypass_l1(&pack_at<W>(tile.mask + at));
                  return before;
                },
                write);
          } else {
            for_each(NoOp(), [&](int64_t at, int cell, bool) { write(at, cell, Before{}); });
          }
        });
  });
}

// The tiles in shared memory, in the state's type.
template <class A, class T>
struct WavefrontTiles {
  A* x;
  PerAxis<A> h, g;
  GATEDRNN_DEVICE explicit WavefrontTiles(const WavefrontParams<A>& f) {
    const int tile = T::kPixels * f.p.channels;
    const bool keeps_states = f.a.y || T::kNeedsStates;
    x = shared_at<A>(kTilesBegin);
    g = {x + (keeps_states ? 3 : 1) * tile, f.a.gate_directions ? gate_size<T>(f.p, f.a) : 0};
    if (keeps_states)
      h = {x + tile, tile};
    else
      h = {nullptr, 0};
  }
};

template <class A>
GATEDRNN_DEVICE void decode_task(const WavefrontParams<A>& f, int ticket, Task& t) {
  t = f.p.task(ticket);
  if (f.a.y == nullptr || !f.passes_share_y()) t.visit = kOnly;
}

template <class A, class T>
GATEDRNN_DEVICE void prefetch_next_tiles(const WavefrontParams<A>& f) {
  if (next_slot().ticket < f.p.tasks) prefetch_inputs<T>(f.p, next_slot().task, f.a);
}

template <class A, class T>
GATEDRNN_DEVICE void scan_tiles(const WavefrontParams<A>& f) {
  const Task t = task_slot().task;
  const int axis = threadIdx.x / (T::kThreads / 2), d = f.p.direction[t.pass][axis];
  const WavefrontTiles<A, T> tiles(f);
  const ScanTiles<A> own{tiles.x, tiles.g[axis], f.a.gate_channels ? T::kPixels : 0, tiles.h[axis]};
  Border<A> border{};
  if (d >= 0) border = Border<A>::of(f.p, t, f.borders.states[d], axis, t.from_end);
  T::scan(f.a, t, d, LineWalk::of<T::kSide>(t, axis), own, border,
          [&] { wait_upstream<T>(f.p, t, f.flags, t.from_end); });
}

template <class A, class T>
GATEDRNN_DEVICE void write_tiles(const WavefrontParams<A>& f) {
  const Task t = task_slot().task;
  const ScanArgs& a = f.a;
  const PerAxis<A> h = WavefrontTiles<A, T>(f).h;
  if (a.merge == Merge::kNone) {
#pragma unroll 1
    for (int i = 0; i < kAxes; ++i)
      if (const int one = f.p.direction[t.pass][i]; one >= 0)
        write_map<T>(whole_block<T>(), f.p, t, a, one, h[i]);
    return;
  }
  const int64_t corner = tile_corner(f.p, t, a.y_strides, 0, t.c0);
  const bool first = t.visit == kFirst, second = t.visit == kSecond;
  const Dtype left = merge_op(a) == MergeOp::kMax ? a.dtype : state_dtype<A>();
  char* const share = static_cast<char*>(f.share) + corner * bytes_of(left);
  const MergedTile<A> tile{first ? share : static_cast<char*>(a.y) + corner * bytes_of(a.dtype),
                           share, a.mask + corner, first ? left : a.dtype,
                           first ? A(1) : merge_scale<A>(a)};
  const PassMaps<A> maps(f.p.direction[t.pass], h);
  dispatch_merge_op(merge_op(a), [&]<MergeOp Op>() {
    second ? write_merged<T, Op, true>(t, tile, a.y_strides, maps)
           : write_merged<T, Op, false>(t, tile, a.y_strides, maps);
  });
}

// A block owns one tile at a time. The first half of its threads own rows, the second half columns.
// Loads and stores run along the contiguous axis of a map. Shared memory holds WavefrontTiles.
// States are of type A.
template <class A, class T>
__global__ void __launch_bounds__(T::kThreads, T::kScanBlocks)
    wavefront_kernel(const __grid_constant__ WavefrontParams<A> f) {
  const ScanArgs& a = f.a;
  const auto decode = [&](int ticket, Task& t) { decode_task(f, ticket, t); };
  Tasks<T, decltype(decode)> tasks(f.flags.ticket, f.p.tasks, decode);
  while (tasks.next()) {
    const Task& t = task_slot().task;
    load_tiles<T>(f.p, a, f.flags, WavefrontTiles<A, T>(f));
    tasks.look_ahead();
    block_sync<T>();
    prefetch_next_tiles<A, T>(f);
    scan_tiles<A, T>(f);
    finish_states<T>(f.p, t, f.flags);
    if (a.y == nullptr) continue;
    wait_first_visit<T>(f.p, t, f.flags);
    write_tiles<A, T>(f);
    finish_visit<T>(f.p, t, f.flags);
  }
}

template <class T>
void launch_wavefront(WavefrontParams<typename T::Value> f, cudaStream_t stream) {
  const auto kernel = wavefront_kernel<typename T::Value, T>;
  const size_t shared = wavefront_bytes<T>(f.a, f.a.y != nullptr);
  const int blocks = resident_blocks(kernel, T::kThreads, shared, f.p.tasks);
  f.p.advance_together(blocks);
  launch(kernel, dim3(blocks), dim3(T::kThreads), shared, stream, f);
  check_launch("wavefront_kernel");
}

}  // namespace gatedrnn::cuda
