// What central_query.cpp hands to its kernels of one instruction set (central_query_kernels.h).
#pragma once

#include "image.h"

namespace infsa::cpu {

// Queries y = W x^ + b of heads side by side, C = H d channels. A vector is readable behind the ends of vectors.
struct QueryArgs {
  int64_t H, d;
  const void *panels, *columns;  // W (C, D); columns: backward, where dx is wanted
  const void* bias;              // (C)
  const void* gradient;          // backward: s^2 dqbar / E, (C)
  const void* offset;            // backward: s qbar . dqbar / E, (H)
};

// The blocks of a wave, side by side for the product that sums over their tokens: dq as tiles of channels, (C / tile,
// tokens, tile), and x^ as panels of columns, (D / panel, tokens, panel). Null: not wanted.
struct Wave {
  void *query_tiles, *token_panels;
  int64_t tokens;
};

struct CentralQueryKernels {
  int64_t (*scratch_bytes)(int64_t D, int64_t C, bool backward);
  // Adds sum_i ||y_i|| y_i (C) and then sum_i ||y_i|| (H) to sums, for one of `shares` shares of the heads.
  void (*forward)(const Image&, const QueryArgs&, Range, int64_t share, int64_t shares, double* sums, void* scratch);
  // One block, or a piece of one: dx, and its part of the wave from token `at` on.
  void (*backward)(const Image&, const QueryArgs&, Range, const Wave&, int64_t at, void* scratch);
  // dW (C, round_up(D, panel)) += dq^T x^ over the wave's first `tokens` tokens, for some tiles and one panel; dbias
  // (C) += their sum.
  void (*weight_gradient)(const Wave&, int64_t tokens, int64_t C, int64_t D, Range tiles, int64_t panel, void* dweight);
  void (*bias_gradient)(const Wave&, int64_t tokens, int64_t C, Range tiles, double* dbias);
};

}  // namespace infsa::cpu
