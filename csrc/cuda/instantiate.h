// Compiles the kernels that walk over tiles for one kind of steps, for other files to launch. Each
// takes the compiler a while: steps_*.cu share the kinds out, to be compiled side by side.
#pragma once

#include "cuda/backward_kernel.h"
#include "cuda/wavefront_kernel.h"

#define GATEDRNN_INSTANTIATE(...)                                                                 \
  template void launch_wavefront<__VA_ARGS__>(WavefrontParams<__VA_ARGS__::Value>, cudaStream_t); \
  template void launch_backward<__VA_ARGS__>(BackwardParams<__VA_ARGS__::Value>, cudaStream_t)
