#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(INFSA_NEON_BF16)
#include <sys/auxv.h>

// Older C libraries lack the name.
#if !defined(HWCAP2_BF16)
#define HWCAP2_BF16 (1 << 14)
#endif
#endif

namespace infsa::cpu {
namespace {

struct Isa {
  const char* name;
  bool is_here;
  KernelTable kernels;
};

[[maybe_unused]] KernelTable with_pure_of_bfloat16(KernelTable kernels, const PureKernels& pure) {
  kernels.bfloat16.pure = pure;
  return kernels;
}

// The widest first.
const Isa& choose() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  static const Isa all[] = {
#if defined(__x86_64__)
      {"avx512_bf16", avx512 && __builtin_cpu_supports("avx512bf16"),
       with_pure_of_bfloat16(avx512::kernels, avx512_bf16::pure_of_bfloat16)},
      {"avx512", avx512, avx512::kernels},
      {"avx2", avx2, avx2::kernels},
#elif defined(INFSA_NEON_BF16)
      {"neon_bf16", (getauxval(AT_HWCAP2) & HWCAP2_BF16) != 0,
       with_pure_of_bfloat16(portable::kernels, neon_bf16::pure_of_bfloat16)},
#endif
      {"portable", true, portable::kernels}};
  const char* wanted = std::getenv("INFSA_CPU_ISA");
  for (const Isa& isa : all) {
    if (isa.is_here && (!wanted || std::strcmp(wanted, isa.name) == 0)) return isa;
  }
  throw std::runtime_error(std::string("INFSA_CPU_ISA=") + wanted +
                           ": expected portable, or avx2, avx512, avx512_bf16 or neon_bf16 on a CPU that has it");
}

const Isa& isa() {
  static const Isa& chosen = choose();
  return chosen;
}

}  // namespace

const char* isa_name() { return isa().name; }

const Kernels& kernels_for(Dtype dtype) {
  const KernelTable& table = isa().kernels;
  return dtype == kFloat      ? table.float32
         : dtype == kDouble   ? table.float64
         : dtype == kBFloat16 ? table.bfloat16
                              : table.float16;
}

}  // namespace infsa::cpu
