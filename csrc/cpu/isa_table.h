// All kernels of one instruction set; or of one that adds to another what multiplies bfloat16 (INFSA_BF16_PRODUCTS),
// Pure on bfloat16 alone.
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

#if defined(INFSA_BF16_PRODUCTS)

#include "kernels.h"
#include "pure_pairs.h"

namespace infsa::cpu::INFSA_ISA {

extern const PureKernels pure_of_bfloat16 = pure_kernels_in_pairs();

}  // namespace infsa::cpu::INFSA_ISA

#else

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

#endif

#if defined(INFSA_TARGET) && defined(__clang__)
#pragma clang attribute pop
#endif
