// The CPU kernels compiled for AVX2.
#if defined(__x86_64__)
#define INFSA_ISA avx2
#define INFSA_VEC_BYTES 32
#define INFSA_TARGET "avx2,fma,f16c"
#include "isa_table.h"
#endif
