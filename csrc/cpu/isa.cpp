#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace infsa::cpu {
namespace {

bool has(Isa set) {
  switch (set) {
    case Isa::portable:
      return true;
#if defined(__x86_64__)
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::avx512:
      return has(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    default:
      return false;
  }
}

constexpr Isa kWidestFirst[] = {Isa::avx512, Isa::avx2, Isa::portable};

const char* name(Isa set) {
  switch (set) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

Isa choose() {
  if (const char* wanted = std::getenv("INFSA_CPU_ISA")) {
    for (Isa set : kWidestFirst) {
      if (std::strcmp(wanted, name(set)) == 0 && has(set)) return set;
    }
    throw std::runtime_error(std::string("INFSA_CPU_ISA=") + wanted +
                             ": expected portable, or avx2 or avx512 on a CPU that has it");
  }
  for (Isa set : kWidestFirst) {
    if (has(set)) return set;
  }
  return Isa::portable;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name() { return name(isa()); }

}  // namespace infsa::cpu
