// The CPU kernels, by instruction set and dtype. Their callers get them from isa.h.
#pragma once

#include "central_query.h"
#include "linear.h"
#include "pure.h"
#include "score_pool.h"
#include "tokens.h"

// Where the compiler knows ARM's BF16 instructions, and Linux tells whether the CPU has them.
#if defined(__aarch64__) && defined(__linux__) && (!defined(__clang__) || __clang_major__ >= 16)
#define INFSA_NEON_BF16
#endif

namespace infsa::cpu {

struct Kernels {
  int64_t lanes, panel, tile;  // elements of a vector, of a panel's row, of a tile's column
  TokenKernels tokens;
  LinearKernels linear;
  PureKernels pure;
  ImageKernels images;
  CentralQueryKernels central_query;
  ScorePoolKernels score_pool;
};

// Each isa_<set>.cpp has one.
struct KernelTable {
  Kernels float32, float64, bfloat16, float16;
};
namespace portable {
extern const KernelTable kernels;
}
namespace avx2 {
extern const KernelTable kernels;
}
namespace avx512 {
extern const KernelTable kernels;
}
// These add to the table of avx512, and of portable.
namespace avx512_bf16 {
extern const PureKernels pure_of_bfloat16;
}
namespace neon_bf16 {
extern const PureKernels pure_of_bfloat16;
}

}  // namespace infsa::cpu
