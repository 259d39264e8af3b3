// The kernels of the wavefront and of the backward pass for blocks of 2.
#include "cuda/instantiate.h"

namespace gatedrnn::cuda {

GATEDRNN_INSTANTIATE(KnownSteps<2>);

}  // namespace gatedrnn::cuda
