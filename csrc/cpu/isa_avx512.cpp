// The CPU kernels compiled for AVX-512.
#if defined(__x86_64__)

#define INFSA_ISA avx512
#define INFSA_VEC_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "layer_kernels.h"
#include "linear_kernels.h"
#include "pure_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
