// What score_pool.cpp hands to its kernels of one instruction set (score_pool_kernels.h).
#pragma once

#include "image.h"

namespace infsa::cpu {

// Scores of H heads, padded to whole vectors, P of them. The backward's matrix is [keys; dpooled / R], of 2 P rows.
struct ScoreArgs {
  int64_t H;
  const void *panels, *columns;
  const void* bias;    // (P)
  const void* offset;  // backward: what is taken off every score's gradient, (P)
};

struct ScorePoolKernels {
  int64_t (*scratch_bytes)(int64_t D, int64_t H, bool backward);
  // Adds sum_j r_j x^_j to weighted (H, round_up(D, panel)) and sum_j r_j to score_sum (H).
  void (*forward)(const Image&, const ScoreArgs&, Range, void* weighted, double* score_sum, void* scratch);
  // dx; adds to dkeys (as weighted) and dbias (H) where they are wanted.
  void (*backward)(const Image&, const ScoreArgs&, Range, void* dkeys, double* dbias, void* scratch);
};

}  // namespace infsa::cpu
