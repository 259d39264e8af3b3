// The backward pass' kernel for any other block size, and float64.
#include "cuda/backward_kernel.h"

namespace gatedrnn::cuda {

GATEDRNN_INSTANTIATE_GENERAL(launch_backward, BackwardParams);

}  // namespace gatedrnn::cuda
