// The backward pass' kernel for blocks of 1, 2 and 4.
#include "cuda/backward_kernel.h"

namespace gatedrnn::cuda {

GATEDRNN_INSTANTIATE(launch_backward, BackwardParams, KnownSteps<1>);
GATEDRNN_INSTANTIATE(launch_backward, BackwardParams, KnownSteps<2>);
GATEDRNN_INSTANTIATE(launch_backward, BackwardParams, KnownSteps<4>);

}  // namespace gatedrnn::cuda
