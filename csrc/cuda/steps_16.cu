// The kernels of the wavefront and of the backward pass for blocks of 16.
#include "cuda/instantiate.h"

namespace gatedrnn::cuda {

GATEDRNN_INSTANTIATE(KnownSteps<16>);

}  // namespace gatedrnn::cuda
