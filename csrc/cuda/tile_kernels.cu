// The kernels that visit tiles, for one block size of the weight. The build compiles this file once
// for each size, in parallel (COMPILED_BLOCKS in build_cuda.py). GATEDRNN_BLOCK is the size. 0
// stands for any other size, and for float64.
#include "cuda/backward_kernel.cuh"
#include "cuda/wavefront_kernel.cuh"

namespace gatedrnn::cuda {

#define GATEDRNN_INSTANTIATE(...)                                                                 \
  template void launch_wavefront<__VA_ARGS__>(WavefrontParams<__VA_ARGS__::Value>, cudaStream_t); \
  template void launch_backward<__VA_ARGS__>(BackwardParams<__VA_ARGS__::Value>, cudaStream_t)

#ifndef GATEDRNN_BLOCK
#error "define GATEDRNN_BLOCK, as build_cuda.py does"
#elif GATEDRNN_BLOCK > 0
GATEDRNN_INSTANTIATE(KnownTraits<GATEDRNN_BLOCK>);
#else
GATEDRNN_INSTANTIATE(KernelTraits<float, 0, 16, 0>);
GATEDRNN_INSTANTIATE(KernelTraits<float, 0, 4, 0>);
GATEDRNN_INSTANTIATE(KernelTraits<float, 0, 1, 0>);
GATEDRNN_INSTANTIATE(KernelTraits<double, 0, 16, 0>);
GATEDRNN_INSTANTIATE(KernelTraits<double, 0, 4, 0>);
GATEDRNN_INSTANTIATE(KernelTraits<double, 0, 1, 0>);
#endif

}  // namespace gatedrnn::cuda
