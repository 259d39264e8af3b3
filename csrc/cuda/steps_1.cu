// The kernels of the wavefront and of the backward pass for blocks of 1.
#include "cuda/instantiate.h"

namespace gatedrnn::cuda {

GATEDRNN_INSTANTIATE(KnownSteps<1>);

}  // namespace gatedrnn::cuda
