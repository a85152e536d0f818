#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace infsa::cpu {
namespace {

struct Isa {
  const char* name;
  bool is_here;
  const KernelTable& kernels;
};

// The widest first.
const Isa& choose() {
  static const Isa all[] = {
#if defined(__x86_64__)
      {"avx512",
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
       avx512::kernels},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"),
       avx2::kernels},
#endif
      {"portable", true, portable::kernels}};
  const char* wanted = std::getenv("INFSA_CPU_ISA");
  for (const Isa& isa : all) {
    if (isa.is_here && (!wanted || std::strcmp(wanted, isa.name) == 0)) return isa;
  }
  throw std::runtime_error(std::string("INFSA_CPU_ISA=") + wanted +
                           ": expected portable, or avx2 or avx512 on a CPU that has it");
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
