// The CPU kernels compiled for AVX-512.
#if defined(__x86_64__)
#define INFSA_ISA avx512
#define INFSA_VEC_BYTES 64
#define INFSA_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#include "isa_table.h"
#endif
