// The CPU kernels compiled for AVX2.
#if defined(__x86_64__)

#define INFSA_ISA avx2
#define INFSA_VEC_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "layer_kernels.h"
#include "linear_kernels.h"
#include "pure_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
