// What pure.cpp hands to the Pure InfSA kernels of one instruction set (pure_kernels.h).
#pragma once

#include "tokens.h"

namespace infsa::cpu {

// Powers of two by which the rows of a head are multiplied as they are read (range.h).
struct PureUnits {
  double q = 1, k = 1, v = 1, dout = 1;
};

// One head of one call. N and M count the tokens that are not masked.
struct PureHead {
  int64_t N, M, d, d_v;
  Tokens q, k, v, dout;  // (N, d), (M, d), (M, d_v), (N, d_v)
  bool tied;             // k is q, and the same tokens count on both sides
  bool few_keys, few_scores, few_columns;
  double rho;  // rho * head_rho
  // In the units, as are F and eps below. A head of few scores makes its own F and c.
  PureUnits unit;
  double eps;
  double inverse_norm;  // backward: 1 / (F + eps)
  double c;             // backward: <dO, O> / (F (F + eps))
};

// Sums of one head, in the accumulation type and in the order of its tokens that count; rows are padded to whole
// vectors, but for those of a forward pass with few columns. The backward pass leaves sum_i P_ij dO_i / (F + eps) in
// dv: the gradient of v but for rho.
struct PureSums {
  void* out;           // (N, d_v)
  void *dq, *dk, *dv;  // (N, d), (M, d), (M, d_v); null where not wanted
};

struct PureKernels {
  int64_t (*scratch_bytes)(const PureHead&, bool backward);  // of each thread
  // Adds what these keys and queries give each other to the sums; forward returns the sum of their P^2. When tied,
  // `mirrored` says that the two ranges differ and that the cell stands for its mirror image too.
  double (*forward)(const PureHead&, const PureSums&, Range keys, Range queries, bool mirrored, void* scratch);
  void (*backward)(const PureHead&, const PureSums&, Range keys, Range queries, bool mirrored, void* scratch);
};

// Scores are made in squares of this many keys and queries: two of them, and the blocks of q, k, v and dout that they
// need, stay in a core's L2. The last block takes up to kPureSlack more, so that the 197 tokens of an image of 224 x
// 224 are one block. Multiples of every tile's rows and of every vector.
constexpr int64_t kPureBlock = 192;
constexpr int64_t kPureSlack = 48;
constexpr int64_t kPureStride = kPureBlock + kPureSlack;

// The gradient of few scores may be a small difference of two terms, of which c, taken from the rounded output, would
// leave its rounding (docs/pure.md): c is made from P and G there, which are one block.
constexpr int64_t kFewScores = 32 * 32;
// With so few keys nothing averages the rounding of a score: its products are summed in runs of kRun.
constexpr int64_t kFewKeys = 16;
constexpr int64_t kRun = 8;

// P v of so few columns is summed from the scores in their registers: P is not stored, and a column does not pay for a
// whole vector of them. What reads a sum per row, as a centrality does, has one.
constexpr int64_t kFewColumns = 4;

INFSA_INLINE constexpr int64_t pure_block(int64_t left) { return left <= kPureStride ? left : kPureBlock; }

}  // namespace infsa::cpu
