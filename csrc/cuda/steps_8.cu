// The kernels of the wavefront and of the backward pass for blocks of 8.
#include "cuda/instantiate.h"

namespace gatedrnn::cuda {

GATEDRNN_INSTANTIATE(KnownSteps<8>);

}  // namespace gatedrnn::cuda
