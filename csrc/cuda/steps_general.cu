// The kernels of the wavefront and of the backward pass for any other block size, and float64.
#include "cuda/instantiate.h"

namespace gatedrnn::cuda {

GATEDRNN_INSTANTIATE(Steps<float, 0, 16, 0>);
GATEDRNN_INSTANTIATE(Steps<float, 0, 4, 0>);
GATEDRNN_INSTANTIATE(Steps<float, 0, 1, 0>);
GATEDRNN_INSTANTIATE(Steps<double, 0, 16, 0>);
GATEDRNN_INSTANTIATE(Steps<double, 0, 4, 0>);
GATEDRNN_INSTANTIATE(Steps<double, 0, 1, 0>);

}  // namespace gatedrnn::cuda
