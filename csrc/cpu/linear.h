// What linear.cpp hands to the Linear-InfSA kernels of one instruction set (linear_kernels.h).
#pragma once

#include <stdint.h>

#include "isa.h"

namespace infsa::cpu {

// One (batch, head, token, channel) tensor; strides in elements. No data: absent, or not wanted.
struct LinearRows {
  void* data;
  int64_t batch, head, token, channel;
};

// (batch, token) of bool, true = ignore; no data: every token counts.
struct LinearMask {
  const bool* data;
  int64_t batch, token;
};

// Powers of two per head, of the accumulation type: what the rows of an input are multiplied by as they are read and
// the rows of a gradient as they are written. Null: 1. They bring a head to order one whose numbers would leave the
// range of the accumulation type on the way.
struct LinearUnits {
  const void *q, *k, *v, *dq, *dk, *dv;
};

// One call. Vectors per head are (B, H, padded(d or dv)) and scalars per head (B, H), all of the accumulation type,
// contiguous, the padding 0 and kLinearSlack bytes readable behind each of them.
struct LinearArgs {
  LinearRows q, k, v, dq, dk, dv;
  LinearMask query_mask, key_mask;
  int64_t H, d, dv_size;
  const void* score_query;   // s qbar: r_j = ReLU(score_query . k_j)
  const void* dcontext;      // rho dz
  const void* dcontext_dot;  // rho dz . context
  const void* score_scale;   // 1 / (score_sum + eps)
  const void* query_vector;  // s^2 dqbar / (energy_sum + eps)
  const void* query_dot;     // query_vector . qbar / s
  LinearUnits unit;
};

// The part of a call that one kernel call does: tokens [begin, end) of `heads` consecutive heads.
struct LinearTask {
  int64_t batch, head, heads, begin, end;
  double* sums;   // added to: (heads, padded) of a weighted sum of rows, then (heads) of the weights
  void* dscores;  // tied backward: (all tokens, heads) of dt
  void* scratch;  // scratch_bytes()
};

constexpr int64_t kLinearSlack = 64;

struct LinearKernels {
  int64_t vector_bytes;
  int64_t (*scratch_bytes)(int64_t heads, int64_t d, int64_t dv, int64_t acc_bytes);
  using Kernel = void (*)(const LinearArgs&, const LinearTask&);
  Kernel fwd_queries, fwd_keys, bwd_keys, bwd_queries;
};

// One table per instruction set; dtype in the order float32, bfloat16, float16, float64.
namespace portable {
extern const LinearKernels linear_kernels[4];
}
namespace avx2 {
extern const LinearKernels linear_kernels[4];
}
namespace avx512 {
extern const LinearKernels linear_kernels[4];
}

}  // namespace infsa::cpu
