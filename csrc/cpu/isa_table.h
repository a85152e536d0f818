// All kernels of one instruction set.
//
// Included by isa_<set>.cpp only, which names the set (INFSA_ISA), its register width (INFSA_VEC_BYTES) and what to
// compile for (INFSA_TARGET).
#pragma once

#if defined(INFSA_TARGET)
#define INFSA_PRAGMA(...) _Pragma(#__VA_ARGS__)
#define INFSA_PRAGMA_OF(...) INFSA_PRAGMA(__VA_ARGS__)
#if defined(__clang__)
INFSA_PRAGMA_OF(clang attribute push(__attribute__((target(INFSA_TARGET))), apply_to = function))
#else
INFSA_PRAGMA_OF(GCC target(INFSA_TARGET))
#endif
#endif

#include "central_query_kernels.h"
#include "convert.h"
#include "kernels.h"
#include "linear_kernels.h"
#include "pure_kernels.h"
#include "score_pool_kernels.h"

namespace infsa::cpu::INFSA_ISA {

template <typename T> constexpr Kernels kernels_of() {
  using A = Acc<T>;
  return {kLanes<A>,
          kPanel<A>,
          kTileRows,
          token_kernels<T>(),
          linear_kernels<T>(),
          pure_kernels<T>(),
          image_kernels<T>(),
          central_query_kernels<T>(),
          score_pool_kernels<T>()};
}

extern const KernelTable kernels = {kernels_of<float>(), kernels_of<double>(), kernels_of<bf16>(), kernels_of<fp16>()};

}  // namespace infsa::cpu::INFSA_ISA

#if defined(INFSA_TARGET) && defined(__clang__)
#pragma clang attribute pop
#endif
