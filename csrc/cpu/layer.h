// What central_query.cpp and score_pool.cpp hand to the kernels of one instruction set (layer_kernels.h).
#pragma once

#include <stdint.h>

#include "tokens.h"

namespace infsa::cpu {

// The tokens of one image, and where their gradient goes (no data: not wanted). With norm, the kernels see every token
// x^ = (x - mean) / sqrt(var + norm_eps) in the place of x.
struct LayerTokens {
  Tokens x, dx;
  int64_t D, block;  // channels, and the tokens in work at a time
  bool norm;
  double norm_eps;
};

// A matrix M (rows, columns) is packed as panels, M transposed: the right side of a product with x (., columns). Packed
// as columns, it is the right side of a product with something (., rows). Both in the accumulation type.

// Queries y = W x^ + b of heads side by side, C = H d channels. Vectors have kLayerSlack readable bytes behind them.
struct QueryArgs {
  int64_t H, d;
  const void *panels, *columns;  // W (C, D); columns: backward, where dx is wanted
  const void* bias;              // (C)
  const void* gradient;          // backward: s^2 dqbar / E, (C)
  const void* offset;            // backward: s qbar . dqbar / E, (H)
};

// Scores of H heads, padded to whole vectors, P of them. The backward's matrix is [keys; dpooled / R], of 2 P rows.
struct ScoreArgs {
  int64_t H;
  const void *panels, *columns;
  const void* bias;    // (P)
  const void* offset;  // backward: what is taken off every score's gradient, (P)
};

// The blocks of a wave, side by side for the product that sums over their tokens: dq as tiles of channels, (C / tile,
// tokens, tile), and x^ as panels of columns, (D / panel, tokens, panel). Null: not wanted.
struct Wave {
  void *query_tiles, *token_panels;
  int64_t tokens;
};

struct LayerKernels {
  int64_t lanes, panel, tile;  // elements of a vector, of a panel's row, of a tile of channels
  // The most tokens that may be in work at a time.
  int64_t (*block)(int64_t D);
  // Packs the panels of `range`, `panel` rows each, and these rows as columns unless null. The source has the call's
  // dtype, or for pack_sums the accumulation type.
  using Pack = void (*)(const Tokens& from, int64_t rows, int64_t columns, Range range, void* panels,
                        void* packed_columns);
  Pack pack, pack_sums;

  int64_t (*query_scratch)(int64_t D, int64_t C, bool backward);
  // Adds sum_i ||y_i|| y_i (C) and then sum_i ||y_i|| (H) to sums.
  void (*query_forward)(const LayerTokens&, const QueryArgs&, Range, double* sums, void* scratch);
  // One block: dx, and its part of the wave from token `at` on.
  void (*query_backward)(const LayerTokens&, const QueryArgs&, Range, const Wave&, int64_t at, void* scratch);
  // dW (C, round_up(D, panel)) += dq^T x^ over the wave's first `tokens` tokens, for some tiles and one panel; dbias
  // (C)
  // += their sum.
  void (*weight_gradient)(const Wave&, int64_t tokens, int64_t C, int64_t D, Range tiles, int64_t panel, void* dweight);
  void (*bias_gradient)(const Wave&, int64_t tokens, int64_t C, Range tiles, double* dbias);
  // Rounds rows of sums, `stride` apart, to the dtype.
  void (*store)(const Tokens& to, Range rows, int64_t columns, const void* sums, int64_t stride);

  int64_t (*score_scratch)(int64_t D, int64_t H, bool backward);
  // Adds sum_j r_j x^_j to weighted (H, round_up(D, panel)) and sum_j r_j to score_sum (H).
  void (*score_forward)(const LayerTokens&, const ScoreArgs&, Range, void* weighted, double* score_sum, void* scratch);
  // dx; adds to dkeys (as weighted) and dbias (H) where they are wanted.
  void (*score_backward)(const LayerTokens&, const ScoreArgs&, Range, void* dkeys, double* dbias, void* scratch);
};

constexpr int64_t kLayerSlack = 64;

// In the order float32, float64, bfloat16, float16.
namespace avx512 {
extern const LayerKernels layer_kernels[4];
}
namespace avx2 {
extern const LayerKernels layer_kernels[4];
}
namespace portable {
extern const LayerKernels layer_kernels[4];
}

}  // namespace infsa::cpu
