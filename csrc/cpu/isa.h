// The instruction sets that the CPU kernels are compiled for, and the one this process runs.
#pragma once

namespace infsa::cpu {

enum class Isa { portable, avx2, avx512 };

// The widest set that this CPU and operating system have, or the one named by INFSA_CPU_ISA=portable|avx2|avx512 (read
// once, at import; a set that the CPU lacks is an error). Portable code is what NEON machines run.
Isa isa();
const char* isa_name();

}  // namespace infsa::cpu
