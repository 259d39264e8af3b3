// The backward pass in three steps: the wavefront kernel stores the carries, the backward kernel
// visits every tile, and the partial sums are added in their order.
#include "cuda/backward.cuh"
#include "cuda/forward.cuh"

namespace gatedrnn::cuda {
namespace {

template <class A>
int64_t backward(const BackwardArgs& a, void* memory, cudaStream_t stream) {
  Workspace workspace(memory);
  const auto bytes = [&]<class T>() { return backward_bytes<T>(a); };
  choose_traits<A>(a, bytes, [&]<class T>() {
    WavefrontParams<A> h{};
    h.a = a;
    h.a.y = nullptr, h.a.mask = nullptr;
    h.p = plan_tiles(a, T::kSide, T::channels(a.block));
    const auto flags = take_flags<2>(workspace, h.p, stream);
    h.flags = flags[0];
    h.borders = take_borders<A>(workspace, a, h.p);

    BackwardParams<A> f{};
    f.a = a;
    f.p = h.p;
    for (bool& from_end : f.p.from_end) from_end = !from_end;
    f.flags = flags[1];
    f.states = h.borders;
    f.adjoints = take_borders<A>(workspace, a, f.p);
    const bool rounds = a.dtype == Dtype::kBFloat16 || a.dtype == Dtype::kFloat16;
    const bool two_passes = f.p.passes == 2;
    f.dx = {a.dx, static_cast<A*>(a.dx), a.dtype};
    f.dg = {a.dg, static_cast<A*>(a.dg), a.dtype};
    if (rounds && two_passes) f.dx.share = workspace.take<A>(a.n * a.c * a.h * a.w);
    const int64_t gates =
        a.n * (a.gate_directions ? a.directions : 1) * (a.gate_channels ? a.c : 1) * a.h * a.w;
    // A gate can serve several channel tiles. Then each writes its own map, and these are summed at
    // the end.
    const bool add_gates = a.dg && !a.gate_channels && f.p.channel_tiles > 1;
    if (add_gates) {
      f.gate_tile_size = gates;
      f.dg.share = workspace.take<A>(gates * f.p.channel_tiles);
      f.dg.result = f.dg.share;
      f.dg.dtype = std::is_same_v<A, double> ? Dtype::kFloat64 : Dtype::kFloat32;
    } else if (a.dg && rounds && two_passes && !a.gate_directions) {
      f.dg.share = workspace.take<A>(gates);
    }
    const int64_t per_image = T::kSumsInChains ? std::max(f.p.tile_rows, f.p.tile_columns)
                                               : f.p.tiles() * int64_t{T::kSumsPerTile};
    f.sums = {a.directions * f.p.channel_tiles, a.n * per_image, f.p.channels * (a.block + 1),
              f.p.channels, a.block};
    double* totals = nullptr;
    if (a.dweight || a.dbias) {
      f.weight_sums = workspace.take<A>(f.sums.count());
      totals = workspace.take<double>(f.sums.groups * f.sums.batches() * f.sums.values);
    }
    if (workspace.counts_only()) return;

    if (totals && T::kSumsInChains)  // an axis may have fewer chains than the other
      check(cudaMemsetAsync(f.weight_sums, 0, f.sums.count() * sizeof(A), stream),
            "cudaMemsetAsync");
    launch_wavefront<T>(h, stream);
    launch_backward<T>(f, stream);
    if (totals) add_weight_sums<A>(a, f.sums, f.weight_sums, totals, stream);
    if (add_gates) add_gate_sums<A>(a, f.p.channel_tiles, f.dg.share, stream);
  });
  return workspace.bytes();
}

}  // namespace

int64_t backward(const BackwardArgs& a, void* workspace, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  return a.dtype == Dtype::kFloat64 ? backward<double>(a, workspace, queue)
                                    : backward<float>(a, workspace, queue);
}

}  // namespace gatedrnn::cuda
