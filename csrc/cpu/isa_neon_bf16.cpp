// What ARM's BF16 instructions do better than NEON, which is the portable code.
#include "kernels.h"
#if defined(INFSA_NEON_BF16)
#define INFSA_ISA neon_bf16
#define INFSA_VEC_BYTES 16
#define INFSA_TARGET "arch=armv8.2-a+bf16"
#define INFSA_BF16_PRODUCTS
#include "isa_table.h"
#endif
