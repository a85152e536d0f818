// What AVX512-BF16 does better than AVX-512.
#if defined(__x86_64__)
#define INFSA_ISA avx512_bf16
#define INFSA_VEC_BYTES 64
#define INFSA_TARGET "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define INFSA_BF16_PRODUCTS
#include "isa_table.h"
#endif
