// The kernels for x86-64 with AVX512.
#include "cpu/standard_headers.h"

#if defined(__x86_64__)
#define GATEDRNN_ISA avx512
#define GATEDRNN_ISA_NAME "avx512"
#define GATEDRNN_VECTOR_BYTES 64

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,bmi2"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,bmi2")
#endif
#include "cpu/kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
