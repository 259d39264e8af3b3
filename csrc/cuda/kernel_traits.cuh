// The recurrence and its adjoint along the lines of one tile, in shared memory.
//
// Half of a block's threads walk the rows of a tile, the other half its columns. The block size K
// of the weight is a constant. A thread keeps R channels of one line, and their weights, in
// registers. For K up to 8 those are all channels of the line in this tile. Then threads exchange
// nothing, and a tile belongs to one warp. general_kernel_traits.cuh has every other block size.
#pragma once

#include "cuda/lines.cuh"

namespace gatedrnn::cuda {

// Four consecutive values. Only `count` of them exist, and the others are zero.
template <class A>
GATEDRNN_DEVICE Pack<A, kPack> load_pack(const A* p, int count) {
  if (count >= kPack && is_aligned(p)) return pack_at<kPack>(p);
  Pack<A, kPack> pack{};
#pragma unroll
  for (int k = 0; k < kPack; ++k)
    if (k < count) pack.values[k] = p[k];
  return pack;
}

// Adds values over `Lanes` lanes of a warp, in the order of a tree. The lanes are Apart, 2 Apart,
// ... from each other. Lane i of them ends with part i of the sums, at the front of `values`.
template <int Lanes, int Apart, int Count, class A>
GATEDRNN_DEVICE void share_sums(A (&values)[Count]) {
  static_assert(Count % Lanes == 0);
  int half = Count / 2;
#pragma unroll
  for (int lane = Lanes / 2; lane > 0; lane /= 2, half /= 2) {
    const bool upper = threadIdx.x / Apart & lane;
#pragma unroll
    for (int i = 0; i < Count / 2; ++i) {
      if (i >= half) continue;
      const A given = upper ? values[i] : values[i + half];
      const A kept = upper ? values[i + half] : values[i];
      values[i] = kept + __shfl_xor_sync(0xffffffff, given, lane * Apart);
    }
  }
}

template <class A, int K, int Side, int R>
struct KernelTraits {
  using Value = A;
  static constexpr int kSide = Side;
  static constexpr int kChannels = K < 8 ? 8 : K;        // of a tile
  static constexpr int kPacksInFlight = K < 16 ? 8 : 4;  // packs that a thread loads at once
  static constexpr int kSinglesInFlight =
      2 * kPacksInFlight;                        // single elements, where there are no packs
  static constexpr int kOwnPacks = R / kPack;    // packs of channels that a thread owns
  static constexpr int kSplits = kChannels / R;  // threads that share a line
  static constexpr int kThreads = 2 * Side * kSplits;
  static constexpr int kPixels = pixel_at<Side>(Side, Side - 1) + 1;
  static constexpr int kTile = kPixels * kChannels;
  static constexpr int kInputs = K > R ? K : R;  // states that a thread's products read
  static constexpr int kLinesPerWarp = Side < 32 / kSplits ? Side : 32 / kSplits;
  static constexpr int kSumsPerTile = Side / kLinesPerWarp;  // one for each warp of a direction
  static constexpr bool kSumsInChains = false;
  static constexpr bool kInPlace = true;       // dg takes the place of h, and e is in registers
  static constexpr bool kNeedsStates = false;  // a scan works without a tile of h
  // Inlined, the adjoint would spill registers.
  static constexpr bool kAdjointNoinline = kSplits > 1 || (K == 8 && kOldArchitecture);
  static constexpr bool kBroadcastsGates =
      true;  // a gate for all channels is copied to each of them
  static_assert(Side % kPack == 0 && R % kPack == 0 && kThreads % 32 == 0);
  // Blocks that fit on a multiprocessor, so that the compiler can choose the number of registers.
  static constexpr int blocks(int tiles) {
    const int fit = kSharedMemory / (tiles * kTile * int{sizeof(A)} + 1024 + 256);
    const int most = 65536 / 255 / kThreads;  // if a thread has as many registers as it can
    return fit < 1 ? 1 : fit < most ? fit : most;
  }
  static constexpr int kScanBlocks = blocks(4), kAdjointBlocks = blocks(5);

  static GATEDRNN_INLINE int channels(int64_t) { return kChannels; }

  // Packs of channels swap places every four rows and columns. Eight lanes that read a pack of a
  // pixel each then use all banks.
  static GATEDRNN_INLINE constexpr int cell(int row, int column, int channel) {
    return pixel_at<Side>(row, column) * kChannels + (channel ^ ((row ^ column) & kPack));
  }
  // Moves from channel 0 of a pixel to another channel.
  static GATEDRNN_INLINE constexpr int other_channel(int cell, int channel) {
    return cell ^ channel;
  }
  // Moves down a column, starting from one of the first four rows.
  static GATEDRNN_INLINE constexpr int down(int cell, int rows) {
    return (cell ^ (rows & kPack)) + rows * kChannels;
  }
  static_assert(kPack == 4);  // cell() and down() use bit 2 of rows, columns and channels alike

  // The line and the channels that a thread owns.
  struct Lane {
    int line, split;
    bool is_there;  // whether the direction has this line in the tile
    GATEDRNN_DEVICE Lane() : Lane(static_cast<int>(threadIdx.x) % (kThreads / 2), true) {}
    GATEDRNN_DEVICE Lane(int place, bool is_there)
        : line(place / kSplits), split(place % kSplits), is_there(is_there) {}
    // A thread's own packs of channels come first, then those of the threads that share its line.
    GATEDRNN_DEVICE int pack(int m) const { return m ^ split; }
    GATEDRNN_DEVICE int channel(int r) const { return pack(r / kPack) * kPack + r % kPack; }
    GATEDRNN_DEVICE int at_border(int m) const { return line * kChannels + pack(m) * kPack; }
  };

  // The place of the state that enters a line: the unused pixel of column number `line`.
  static GATEDRNN_DEVICE int entry(const Lane& lane) {
    return cell(Side, lane.line, lane.pack(0) * kPack);
  }

  // Moves R channels of a pixel between a tile and registers. `at` is the place of the first pack.
  template <class V>
  static GATEDRNN_DEVICE void get(const V* tile, int at, V (&values)[R]) {
#pragma unroll
    for (int m = 0; m < kOwnPacks; ++m) {
      const Pack<V, kPack> pack = pack_at<kPack>(tile + (at ^ m * kPack));
#pragma unroll
      for (int k = 0; k < kPack; ++k) values[m * kPack + k] = pack.values[k];
    }
  }
  template <class V>
  static GATEDRNN_DEVICE void put(V* tile, int at, const V (&values)[R]) {
#pragma unroll
    for (int m = 0; m < kOwnPacks; ++m) {
      Pack<V, kPack> pack;
#pragma unroll
      for (int k = 0; k < kPack; ++k) pack.values[k] = values[m * kPack + k];
      store_pack(tile + (at ^ m * kPack), pack);
    }
  }
  template <class Border>
  static GATEDRNN_DEVICE void load_carry(const Border& border, const Lane& lane, A (&h)[R]) {
#pragma unroll
    for (int m = 0; m < kOwnPacks; ++m) {
      Pack<A, kPack> pack{};
      if (lane.is_there) pack = border.template load_carry<kPack>(lane.at_border(m));
#pragma unroll
      for (int k = 0; k < kPack; ++k) h[m * kPack + k] = pack.values[k];
    }
  }
  template <class Border>
  static GATEDRNN_DEVICE void store_carry(const Border& border, const Lane& lane, const A (&h)[R]) {
    if (!lane.is_there) return;
#pragma unroll
    for (int m = 0; m < kOwnPacks; ++m) {
      Pack<A, kPack> pack;
#pragma unroll
      for (int k = 0; k < kPack; ++k) pack.values[k] = h[m * kPack + k];
      border.template store_carry<kPack>(lane.at_border(m), pack);
    }
  }

  // Visits the pixels of a thread's line: calls first(at), then step(at, next, has_next) for each
  // pixel. `at` is the place of the thread's first pack.
  template <class First, class Step>
  static GATEDRNN_DEVICE void for_each_pixel(const LineWalk& walk, const Lane& lane,
                                             const First& first, const Step& step) {
    const auto place = [&](int i) {
      return walk.template cell<KernelTraits>(lane.line, i, lane.pack(0) * kPack);
    };
    int at = place(0);
    if (lane.is_there) first(at);
    if (walk.whole) {
      // After four pixels, the distance to the next pixel is different (pixel_at), and packs swap
      // places.
      const int stride = walk.axis == 0 ? Side + 1 : 1, skip = walk.axis == 0 ? kChannels : 0;
      const int onward = (walk.from_end ? -stride : stride) * kChannels;
      const int over = walk.from_end ? -skip : skip;
#pragma unroll 1
      for (int i = 0; i < Side; i += kPack)
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
          const int here = at;
          at += onward;
          if (k == kPack - 1) at = (at + over) ^ kPack;
          step(here, at, k < kPack - 1 || i < Side - kPack);
        }
    } else {
#pragma unroll 1
      for (int i = 0; i < walk.length; ++i) {
        const int here = at;
        at = place(i + 1 < walk.length ? i + 1 : i);
        step(here, at, i + 1 < walk.length);
      }
    }
  }

  // The weight's rows for a thread's channels.
  struct Weights {
    A w[R][K], bias[R];
    Weights() = default;
    GATEDRNN_DEVICE Weights(const ScanArgs& a, const Task& t, int d, const Lane& lane) {
      const A* const weight = static_cast<const A*>(a.weight) + (d * a.c + t.c0) * K;
      const A* const b = static_cast<const A*>(a.bias);
#pragma unroll
      for (int m = 0; m < kOwnPacks; ++m) {
        const int channel = lane.pack(m) * kPack, there = t.channels - channel;
#pragma unroll
        for (int i = 0; i < K; ++i) {  // K packs: K / 4 for each of four rows, or parts of several
          const int row = i * kPack / K, from = i * kPack % K;
          const int column = K > kPack ? lane.pack(from / kPack) * kPack : from;
          const Pack<A, kPack> pack =
              load_pack(weight + (channel + row) * K + column, (there - row) * K - column);
#pragma unroll
          for (int k = 0; k < kPack; ++k)
            w[m * kPack + (i * kPack + k) / K][(i * kPack + k) % K] = pack.values[k];
        }
        const Pack<A, kPack> pack = load_pack(b + d * a.c + t.c0 + channel, b ? there : 0);
#pragma unroll
        for (int k = 0; k < kPack; ++k) bias[m * kPack + k] = pack.values[k];
      }
    }
    // The first input that channel r mixes.
    static GATEDRNN_INLINE constexpr int inputs_of(int r) { return K > R ? 0 : r / K * K; }
    // u = bias + w v.
    GATEDRNN_DEVICE void product(const A (&v)[kInputs], A (&u)[R]) const {
#pragma unroll
      for (int r = 0; r < R; ++r) u[r] = bias[r];
#pragma unroll
      for (int k = 0; k < K; ++k)
#pragma unroll
        for (int r = 0; r < R; ++r) u[r] += w[r][k] * v[inputs_of(r) + k];
    }
    // back = w^T v.
    GATEDRNN_DEVICE void transposed_product(const A (&v)[R], A (&back)[R]) const {
      A sums[kInputs] = {};
#pragma unroll
      for (int i = 0; i < (K > R ? R : K); ++i)
#pragma unroll
        for (int k = 0; k < kInputs; ++k) {
          const int r = K > R ? i : k / K * K + i;
          sums[k] += w[r][K > R ? k : k % K] * v[r];
        }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        back[r] = sums[r];
        // The other threads of the line have the other rows.
#pragma unroll
        for (int m = 1; m < kSplits; ++m)
          back[r] += __shfl_xor_sync(0xffffffff, sums[(m * R + r) % kInputs], m);
      }
    }
  };
  // Gathers a thread's own channels, and those of the threads that share its line.
  static GATEDRNN_DEVICE void gather(const A (&own)[R], A (&all)[kInputs]) {
#pragma unroll
    for (int m = 0; m < kSplits; ++m)
#pragma unroll
      for (int r = 0; r < R; ++r)
        if (m * R + r < kInputs)
          all[m * R + r] = m == 0 ? own[r] : __shfl_xor_sync(0xffffffff, own[r], m);
  }

  // Computes h of every pixel, Eq. (3). All threads of a block call this; without a direction (d <
  // 0) they do nothing. They call ready() as late as possible, just before they read the carries.
  template <class Border, class Ready>
  static GATEDRNN_DEVICE void scan(const ScanArgs& a, const Task& t, int d, const LineWalk& walk,
                                   const ScanTiles<A>& s, const Border& border,
                                   const Ready& ready) {
    Lane lane;
    lane.is_there = d >= 0 && lane.line < walk.lines;
    const Weights w(a, t, d < 0 ? 0 : d, lane);
    ready();
    if (d >= 0) scan(a, walk, s, border, lane, w);
  }
  template <class Border>
  static GATEDRNN_DEVICE void scan(const ScanArgs& a, const LineWalk& walk, const ScanTiles<A>& s,
                                   const Border& border, const Lane& lane, const Weights& w) {
    if (kSplits == 1 && !lane.is_there) return;
    A h[R], x[R] = {}, g[R] = {};
    load_carry(border, lane, h);
    if (s.h && lane.is_there) put(s.h, entry(lane), h);
    const auto fetch = [&](int at) {
      get(s.x, at, x);
      get(s.g, at, g);
    };
    dispatch_nonlinearity(a.nonlinearity, [&](auto theta) {
      for_each_pixel(walk, lane, fetch, [&](int here, int next, bool has_next) {
        A all[kInputs], u[R];
        gather(h, all);
        w.product(all, u);
#pragma unroll
        for (int r = 0; r < R; ++r) h[r] = activated(theta(), x[r], g[r], u[r]);
        if (!lane.is_there) return;
        if (s.h) put(s.h, here, h);
        if (has_next) fetch(next);
      });
    });
    store_carry(border, lane, h);
  }

  // Runs the adjoint, against the direction whose walk is given. The tile must hold h, from scan().
  template <class Ready>
  static GATEDRNN_DEVICE void adjoint(const ScanArgs& a, const Task& t, int d, const LineWalk& walk,
                                      const AdjointTiles<A>& s, const Border<A>& border,
                                      const Ready& ready) {
    Lane lane;
    lane.is_there = d >= 0 && lane.line < walk.lines;
    const Weights w(a, t, d < 0 ? 0 : d, lane);
    ready();
    if (kThreads > 32 && d < 0)
      return;  // with one warp, lanes of both axes meet in the shuffles below
    A sums[kSums] = {};
    if (kSplits > 1 || lane.is_there) adjoint(a, walk, s, border, lane, w, sums);
    // The lines of a warp are summed in the order of a tree. Every warp has its own slot.
    share_sums<kLinesPerWarp, kSplits>(sums);
    if (d < 0 || s.sums == nullptr) return;
    A* const slot = s.sums + lane.line / kLinesPerWarp * kChannels * (K + 1);
    constexpr int share = kSums / kLinesPerWarp;
#pragma unroll
    for (int i = 0; i < share; ++i) {
      const int at = lane.line % kLinesPerWarp * share + i, r = at / (K + 1), k = at % (K + 1);
      if (r >= R) continue;
      const int from = K > R && k < K ? lane.channel(k) : k;
      slot[lane.channel(r) * (K + 1) + from] = sums[i];
    }
  }

 private:
  // A line's sums of dweight and dbias, padded with zeros to a multiple of the lines.
  static constexpr int kSums = (R * (K + 1) + kLinesPerWarp - 1) / kLinesPerWarp * kLinesPerWarp;

  static GATEDRNN_DEVICE void adjoint(const ScanArgs& a, const LineWalk& walk,
                                      const AdjointTiles<A>& s, const Border<A>& border,
                                      const Lane& lane, const Weights& w, A (&sums)[kSums]) {
    A e[R], here_h[R] = {}, xi[R] = {}, g[R] = {};
    load_carry(border, lane, e);
    const auto fetch = [&](int at) {
      get(s.dx, at, xi);
      get(s.g, at, g);
    };
    dispatch_nonlinearity(a.nonlinearity, [&](auto theta) {
      const auto first = [&](int at) {
        fetch(at);
        get(s.h, at, here_h);
      };
      for_each_pixel(walk.reversed(), lane, first, [&](int here, int before, bool has_before) {
        A back[R], h[R] = {}, all[kInputs], u[R], delta[R], slope[R];
        if (lane.is_there) get(s.h, has_before ? before : entry(lane), h);
        w.transposed_product(e, back);
        gather(h, all);
        w.product(all, u);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          delta[r] = activation_backward<ScalarMath<A>>(theta(), here_h[r], xi[r] + back[r]);
          e[r] = lane.is_there ? g[r] * delta[r] : A(0);
          slope[r] = delta[r] * u[r];
          sums[r * (K + 1) + K] += e[r];
#pragma unroll
          for (int k = 0; k < K; ++k)
            sums[r * (K + 1) + k] += e[r] * all[Weights::inputs_of(r) + k];
          here_h[r] = h[r];
        }
        if (!lane.is_there) return;
        put(s.dx, here, delta);
        if (s.dg) put(s.dg, here, slope);  // this pixel's h is not needed any more
        if (has_before) fetch(before);
      });
    });
    store_carry(border, lane, e);
  }
};

}  // namespace gatedrnn::cuda
