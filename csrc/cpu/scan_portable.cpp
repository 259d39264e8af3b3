// The kernels for any processor: 128-bit vectors (SSE2, NEON, or what the compiler makes of them).
#include "cpu/standard_headers.h"

#define GATEDRNN_ISA portable
#define GATEDRNN_ISA_NAME "portable"
#define GATEDRNN_VECTOR_BYTES 16
#include "cpu/kernels.inc"
