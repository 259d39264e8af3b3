// The kernels for x86-64 with AVX2.
#include "cpu/standard_headers.h"

#if defined(__x86_64__)
#define GATEDRNN_ISA avx2
#define GATEDRNN_ISA_NAME "avx2"
#define GATEDRNN_VECTOR_BYTES 32

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif
#include "cpu/kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
