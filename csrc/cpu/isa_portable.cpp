// The CPU kernels in 16-byte vectors, for whatever the compiler's own target is: SSE2 on x86-64, NEON on AArch64.
#define INFSA_ISA portable
#define INFSA_VEC_BYTES 16
#include "isa_table.h"
