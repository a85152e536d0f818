// The instruction set that the CPU kernels of this process are compiled for.
#pragma once

#include "../library.h"
#include "../torch.h"
#include "kernels.h"

namespace infsa::cpu {

// Of the widest set that this CPU and operating system have, or of the one named by
// INFSA_CPU_ISA=portable|avx2|avx512|avx512_bf16|neon_bf16 (read once, at import; a set that the CPU lacks is an
// error). Portable code is what NEON machines run.
const Kernels& kernels_for(Dtype dtype);

}  // namespace infsa::cpu
