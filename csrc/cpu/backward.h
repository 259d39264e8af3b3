// Backward pass: h is recomputed chunk by chunk, then the adjoint runs against it.
#pragma once

#include "cpu/huge_pages.h"
#include "cpu/lines.h"

namespace gatedrnn::GATEDRNN_ISA {

// Gradients of one batch, and the partial sums of dweight and dbias, one slot for each block of
// lines and direction: [slot][C * block + C].
template <class A>
struct BackwardMaps {
  A* dx;
  A* dg;
  A* partials;
  bool merged;  // an earlier axis has left its share in dx (and dg)
};

// The tiles and states that the directions of a block of lines work on.
template <class A>
struct BackwardTiles {
  A *x, *gate, *derivative, *xi, *h, *u, *e, *dx, *dg;
  uint8_t* mask;
  A *state, *delta, *e_state, *carries, *dweight, *dbias, *no_bias;
};

template <class A>
A sum_of_lanes(const A* lanes) {
  A sum{};
  for (int i = 0; i < kLanes<A>; ++i) sum += lanes[i];
  return sum;
}

// dL/dy is split evenly among the directions that attain the maximum.
template <class A>
void share_ties(A* xi, const uint8_t* mask, int64_t size) {
  typedef Wide<A> V;
  for (int64_t i = 0; i < size; i += kLanes<A>)
    store(xi + i, load<V>(xi + i) * share_of<V>(load<Bytes<V>>(mask + i)));
}

template <class A, class S, int B>
void backward_block(const BackwardArgs& a, const A* transposed, const BackwardMaps<A>& maps,
                    bool along_width, int64_t n, int64_t line) {
  LineBlock<A, S, B> block(a, n, along_width, line);
  const AxisDirections directions(a, along_width);
  const Lines lines = lines_of(a.h, a.w, along_width);
  const int64_t row = block.row(), most = channels_per_tile(a);
  const bool gates_differ = a.g && a.gate_directions, separate = a.merge == Merge::kNone;
  const bool clamp = a.g && a.gate_activation == GateActivation::kClamp;
  const auto forward = clamp ? forward_step<A, B, Also::kClampAndKeep>(a.block)
                             : forward_step<A, B, Also::kKeep>(a.block);
  const auto backward =
      clamp ? backward_step<A, B, true>(a.block) : backward_step<A, B, false>(a.block);
  const int64_t tile_pixel = row * most, gate_pixel = a.g ? tile_pixel : 0;
  const Chunks chunks(lines.length, tile_pixel * 8 * sizeof(A));
  const int64_t tile = chunks.capacity() * tile_pixel,
                gate_tile = std::max(chunks.capacity() * gate_pixel, row);
  const int64_t slot_size = a.c * a.block + a.c;

  const bool sums = a.dweight || a.dbias;
  Arena arena;
  const auto s = arena.lay_out([&](Cutter& cutter) {
    BackwardTiles<A> s{};
    s.x = cutter.take<A>(tile);
    s.gate = cutter.take<A>(gate_tile);
    if (a.dg && is_smooth(a.gate_activation)) s.derivative = cutter.take<A>(gate_tile);
    s.xi = cutter.take<A>(tile);
    if (a.mask) s.mask = cutter.take<uint8_t>(tile);
    s.h = cutter.take<A>(tile);  // without room for a whole line, one chunk of what is not kept
    s.u = cutter.take<A>(tile);
    s.e = cutter.take<A>(kChunkPixels * tile_pixel);
    s.dx = cutter.take<A>(tile);
    if (a.dg) s.dg = cutter.take<A>(gate_tile);
    s.state = cutter.take<A>(tile_pixel);
    s.delta = cutter.take<A>(tile_pixel);
    s.e_state = cutter.take<A>(tile_pixel);
    s.carries = cutter.take<A>(chunks.count * tile_pixel);
    if (sums) s.dweight = cutter.take<A>(most * a.block * kLanes<A>);
    if (sums) s.dbias = cutter.take<A>(most * kLanes<A>);
    s.no_bias = cutter.take<A>(most);
    return s;
  });
  std::fill(s.no_bias, s.no_bias + most, A{});
  if (!a.g) block.fill_ones(s.gate);

  for (block.c0 = 0; block.c0 < a.c; block.c0 += most) {
    block.shape.c = std::min(most, a.c - block.c0);
    const int64_t pixel = block.pixel();
    for (int i = 0; i < directions.count; ++i) {
      const int64_t d = directions.d[i];
      const int64_t at_channel = d * a.c + block.c0;
      ForwardChunk<A> f{};
      f.reverse = kDirectionTable[a.direction[d]].reverse;
      f.channels = block.shape.c;
      f.block = a.block;
      f.nonlinearity = a.nonlinearity;
      f.w = static_cast<const A*>(a.weight) + at_channel * a.block;
      f.bias = a.bias ? static_cast<const A*>(a.bias) + at_channel : s.no_bias;
      f.state = s.state;

      BackwardChunk<A> r{};
      static_cast<Chunk<A>&>(r) = f;
      r.w_transposed = transposed + at_channel * a.block;
      r.bit = static_cast<uint8_t>(1 << d);
      r.scale = merge_scale<A>(a.merge, a.directions);
      r.e = s.e;
      r.delta = s.delta;
      r.state = s.e_state;

      const bool enter = !chunks.resident || i == 0;
      const bool leave = !chunks.resident || i == directions.count - 1;
      // Reads x and g of chunk k and recomputes h and u, from the state before it; onward: which
      // way the next chunk lies.
      const auto recompute = [&](int64_t k, bool onward) {
        const int64_t t0 = chunks.begin(k), place = chunks.place(k) * pixel;
        const int64_t gate_place = chunks.place(k) * block.gate_pixel();
        f.length = block.shape.t = chunks.pixels(k);
        f.x = block.template tile_map<const A>(s.x + place);
        f.g = block.gate_tile(s.gate + gate_place);
        f.h = s.h + place;
        f.u = s.u + place;
        if (enter) block.read(at<S>(a.x, a.x_strides, n, 0), a.x_strides, t0, onward, s.x + place);
        if (a.g && (enter || gates_differ))
          block.read_gate(d, t0, onward, s.gate + gate_place,
                          s.derivative ? s.derivative + gate_place : nullptr, false);
        forward(f);
        block.clear_idle_lanes(f.h, f.length * block.shape.c);
        block.clear_idle_lanes(s.state, block.shape.c);
      };
      std::fill(s.state, s.state + pixel, A{});
      for (int64_t j = 0; j < chunks.count; ++j) {
        std::copy(s.state, s.state + pixel, s.carries + j * pixel);
        if (chunks.resident || j < chunks.count - 1)
          recompute(f.reverse ? chunks.count - 1 - j : j, f.reverse);
      }

      std::fill(s.e_state, s.e_state + pixel, A{});
      if (sums) {
        std::fill(s.dweight, s.dweight + block.shape.c * a.block * kLanes<A>, A{});
        std::fill(s.dbias, s.dbias + block.shape.c * kLanes<A>, A{});
      }
      // A tile of dx (dg) is fresh where the tile of x (of the gates) is. It is added to what its
      // map holds already: of an earlier axis or direction, or, for a gate of all channels, tile of
      // them.
      const bool enter_dg = enter || gates_differ, leave_dg = leave || gates_differ;
      const bool dx_before = maps.merged || (!chunks.resident && i > 0);
      const bool dg_before = (!gates_differ && dx_before) || (!a.gate_channels && block.c0 > 0);
      const LineStrides dg_strides = line_strides(a.dg_strides, along_width);
      A* const dg_map = a.dg ? at<A>(maps.dg, a.dg_strides, n, gates_differ ? d : 0) : nullptr;
      for (int64_t j = chunks.count - 1; j >= 0; --j) {
        const int64_t k = f.reverse ? chunks.count - 1 - j : j;
        const int64_t t0 = chunks.begin(k), place = chunks.place(k) * pixel;
        const int64_t gate_place = chunks.place(k) * block.gate_pixel();
        const A* const before = s.carries + j * pixel;
        if (!chunks.resident) {
          std::copy(before, before + pixel, s.state);
          recompute(k, !f.reverse);
        }
        r.length = block.shape.t = chunks.pixels(k);
        r.g = block.gate_tile(s.gate + gate_place);
        A* const xi = s.xi + place;
        uint8_t* const winners = s.mask ? s.mask + place : nullptr;
        if (enter || separate)
          block.read(at<S>(a.grad, a.grad_strides, n, separate ? d : 0), a.grad_strides, t0,
                     !f.reverse, xi);
        if (enter && winners) {
          block.read(at<uint8_t>(a.mask, a.y_strides, n, 0), a.y_strides, t0, !f.reverse, winners);
          share_ties(xi, winners, r.length * pixel);
        }
        r.xi = xi;
        r.mask = winners;
        r.h = s.h + place;
        r.u = s.u + place;
        r.gate_derivative = s.derivative ? s.derivative + gate_place : nullptr;
        r.dx = s.dx + place;
        r.dg = s.dg ? s.dg + gate_place : nullptr;
        r.fresh_dx = enter;
        r.fresh_dg = enter_dg;
        backward(r);
        if (sums)
          weight_gradient<A, B>(
              {r.length, r.reverse, r.channels, r.block, s.e, r.h, before, s.dweight, s.dbias});

        if (leave) {
          const LineStrides strides = line_strides(a.dx_strides, along_width);
          unpack(r.dx, block.corner(at<A>(maps.dx, a.dx_strides, n, 0), strides, t0), strides,
                 block.shape, block.ahead(strides, t0, !f.reverse), dx_before);
        }
        if (r.dg && leave_dg)
          unpack(r.dg, block.corner(dg_map, dg_strides, t0), dg_strides, block.gate_shape(),
                 block.ahead(dg_strides, t0, !f.reverse), dg_before);
      }

      if (sums) {
        const int64_t blocks = ceil_div(lines.count, row);
        A* slot = maps.partials + ((n * blocks + line / row) * directions.count + i) * slot_size;
        for (int64_t c = 0; c < block.shape.c; ++c) {
          for (int64_t k = 0; k < a.block; ++k)
            slot[(block.c0 + c) * a.block + k] =
                sum_of_lanes(s.dweight + (c * a.block + k) * kLanes<A>);
          slot[a.c * a.block + block.c0 + c] = sum_of_lanes(s.dbias + c * kLanes<A>);
        }
      }
    }
  }
}

// Adds the slots of one axis to the totals [D][C * block + C], in the slots' order.
template <class A>
void add_partials(const BackwardArgs& a, bool along_width, int64_t blocks, const A* partials,
                  double* totals) {
  const AxisDirections directions(a, along_width);
  const int64_t size = a.c * a.block + a.c;
  for (int64_t slot = 0; slot < blocks; ++slot)
    for (int i = 0; i < directions.count; ++i) {
      const A* from = partials + (slot * directions.count + i) * size;
      double* to = totals + directions.d[i] * size;
      for (int64_t j = 0; j < size; ++j) to[j] += static_cast<double>(from[j]);
    }
}

template <class A, class S, int B>
void backward_batch(const BackwardArgs& a, const A* transposed, BackwardMaps<A> maps,
                    double* totals) {
  for (const bool along_width : {true, false}) {
    const int count = AxisDirections(a, along_width).count;
    if (count == 0) continue;
    const int64_t blocks = a.n * ceil_div(lines_of(a.h, a.w, along_width).count, B * kLanes<A>);
    std::unique_ptr<A[]> partials;
    if (totals) partials.reset(new A[blocks * count * (a.c * a.block + a.c)]);
    maps.partials = partials.get();
    for_each_block<B * kLanes<A>>(a, along_width, [&](int64_t n, int64_t line) {
      backward_block<A, S, B>(a, transposed, maps, along_width, n, line);
    });
    maps.merged = true;
    if (totals) add_partials(a, along_width, blocks, maps.partials, totals);
  }
}

template <class A, class S>
void backward(const BackwardArgs& a) {
  // w^T within each block: the product's inner loop reads it as the forward pass reads w.
  const A* weight = static_cast<const A*>(a.weight);
  std::unique_ptr<A[]> transposed(new A[a.directions * a.c * a.block]);
  for (int64_t first = 0; first < a.directions * a.c; first += a.block)
    for (int64_t r = 0; r < a.block; ++r)
      for (int64_t k = 0; k < a.block; ++k)
        transposed[(first + k) * a.block + r] = weight[(first + r) * a.block + k];

  const bool sums = a.dweight || a.dbias;
  const int64_t total = a.c * a.block + a.c;
  std::vector<double> totals(sums ? a.directions * total : 0);

  const int64_t step = images_per_batch(a, 5), image = a.c * a.h * a.w;
  const int64_t gates = a.dg_strides.n;  // dense: elements of an image's gates
  ask_for_huge_pages(a.dx, a.n * image * int64_t{sizeof(S)});
  if (a.dg) ask_for_huge_pages(a.dg, a.n * gates * int64_t{sizeof(S)});
  constexpr bool in_place = std::is_same_v<A, S>;
  const int64_t most = in_place ? 0 : std::min(step, a.n);
  std::unique_ptr<A[]> dx_sums(new A[most * image]), dg_sums(new A[a.dg ? most * gates : 0]);
  for (int64_t n = 0; n < a.n; n += step) {
    BackwardArgs batch = a;
    batch.n = std::min(step, a.n - n);
    batch.x = at<S>(a.x, a.x_strides, n, 0);
    if (a.g) batch.g = at<S>(a.g, a.g_strides, n, 0);
    batch.grad = at<S>(a.grad, a.grad_strides, n, 0);
    if (a.mask) batch.mask = a.mask + n * a.y_strides.n;
    S* dx = at<S>(a.dx, a.dx_strides, n, 0);
    S* dg = a.dg ? at<S>(a.dg, a.dg_strides, n, 0) : nullptr;
    BackwardMaps<A> maps{};
    if constexpr (in_place) {
      maps.dx = dx, maps.dg = dg;
    } else {
      maps.dx = dx_sums.get(), maps.dg = dg_sums.get();
    }
    double* const into = sums ? totals.data() : nullptr;
    backward_batch<A, S, kRegisters>(batch, transposed.get(), maps, into);
    if constexpr (!in_place) {
      round_to_storage(maps.dx, dx, batch.n * image);
      if (dg) round_to_storage(maps.dg, dg, batch.n * gates);
    }
  }

  for (int64_t d = 0; sums && d < a.directions; ++d) {
    const double* from = totals.data() + d * total;
    const int64_t weights = a.c * a.block;
    for (int64_t j = 0; a.dweight && j < weights; ++j)
      static_cast<A*>(a.dweight)[d * weights + j] = static_cast<A>(from[j]);
    for (int64_t c = 0; a.dbias && c < a.c; ++c)
      static_cast<A*>(a.dbias)[d * a.c + c] = static_cast<A>(from[weights + c]);
  }
}

}  // namespace gatedrnn::GATEDRNN_ISA
