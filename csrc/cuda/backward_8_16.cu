// The backward pass' kernel for blocks of 8 and 16.
#include "cuda/backward_kernel.h"

namespace gatedrnn::cuda {

GATEDRNN_INSTANTIATE(launch_backward, BackwardParams, KnownSteps<8>);
GATEDRNN_INSTANTIATE(launch_backward, BackwardParams, KnownSteps<16>);

}  // namespace gatedrnn::cuda
