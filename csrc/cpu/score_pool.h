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
  // Backward with a floor, (P), else null: what every score gains, and the gradient of the absolute scores' sum.
  const void *floor, *floor_gradient;
};

// What the forward adds to: sum_j r_j x^_j (H, round_up(D, panel)) and sum_j r_j (H); with a floor also sum_j x^_j, one
// row more, and sum_j |t_j|, as many numbers more.
struct ScoreSums {
  void* rows;
  double* scores;
  bool floor;
};

struct ScorePoolKernels {
  int64_t (*scratch_bytes)(int64_t D, int64_t H, bool backward);
  void (*forward)(const Image&, const ScoreArgs&, Range, const ScoreSums&, void* scratch);
  // dx; adds to dkeys (H, round_up(D, panel)) and dbias (H) where they are wanted.
  void (*backward)(const Image&, const ScoreArgs&, Range, void* dkeys, double* dbias, void* scratch);
};

}  // namespace infsa::cpu
