// The kernels of the wavefront and of the backward pass for blocks of 4.
#include "cuda/instantiate.h"

namespace gatedrnn::cuda {

GATEDRNN_INSTANTIATE(KnownSteps<4>);

}  // namespace gatedrnn::cuda
