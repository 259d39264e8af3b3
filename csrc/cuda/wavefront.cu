// Forward pass by a wavefront: the host code (kernel: wavefront_kernel.cuh).
#include "cuda/forward.cuh"
#include "cuda/merge.cuh"

namespace gatedrnn::cuda {

template <class A>
int64_t forward_by_wavefront(const ScanArgs& a, void* memory, cudaStream_t stream) {
  Workspace workspace(memory);
  const auto bytes = [&]<class T>() { return wavefront_bytes<T>(a, true); };
  choose_traits<A>(a, bytes, [&]<class T>() {
    WavefrontParams<A> f{};
    f.a = a;
    f.p = plan_tiles(a, T::kSide, T::channels(a.block));
    f.flags = take_flags<1>(workspace, f.p, stream)[0];
    f.borders = take_borders<A>(workspace, a, f.p);
    const bool rounds = a.dtype == Dtype::kBFloat16 || a.dtype == Dtype::kFloat16;
    f.share = a.y;
    if (rounds && f.passes_share_y() && merge_op(a) != MergeOp::kMax)
      f.share = workspace.take<A>(a.n * a.c * a.h * a.w);
    if (!workspace.counts_only()) launch_wavefront<T>(f, stream);
  });
  return workspace.bytes();
}
template int64_t forward_by_wavefront<float>(const ScanArgs&, void*, cudaStream_t);
template int64_t forward_by_wavefront<double>(const ScanArgs&, void*, cudaStream_t);

}  // namespace gatedrnn::cuda
