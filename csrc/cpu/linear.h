// What linear.cpp hands to the Linear-InfSA kernels of one instruction set (linear_kernels.h).
#pragma once

#include "../rows.h"

namespace infsa::cpu {

// Powers of two per head, of the accumulation type: what the rows of an input are multiplied by as they are read and
// the rows of a gradient as they are written (range.h). Null: 1.
struct LinearUnits {
  const void *q, *k, *v, *dq, *dk, *dv;
};

// One call. Vectors per head are (B, H, d or d_v rounded up to vectors) and scalars per head (B, H), all of the
// accumulation type, contiguous, the padding 0 and a vector readable behind each of them.
struct LinearArgs {
  Rows q, k, v, dq, dk, dv;
  Mask query_mask, key_mask;
  int64_t H, d, d_v;
  bool in_cache;             // forward: what a task reads is
  const void* score_query;   // s qbar: r_j = ReLU(score_query . k_j)
  const void* dcontext;      // rho dz
  const void* dcontext_dot;  // rho dz . context
  const void* score_scale;   // 1 / (score_sum + eps), or 1 / D
  const void* query_vector;  // s^2 dqbar / (energy_sum + eps)
  const void* query_dot;     // query_vector . qbar / s
  // Of a floored backward, with D = score_sum + score_floor absolute_sum + eps:
  const void* floor_weight;    // score_floor absolute_sum / (keys D): what every key's weight has of it
  const void* floor_gradient;  // score_floor (rho dz . value_mean - rho dz . context) / D, the gradient of absolute_sum
  LinearUnits unit;
};

// The part of a call that one kernel call does: tokens [begin, end) of `heads` consecutive heads.
struct LinearTask {
  int64_t batch, head, heads, begin, end;
  // Set: (heads, padded) of a weighted sum of rows, then (heads) of the weights. forward_keys_floor: twice as many
  // of both, the second half of the rows themselves and of the scores' absolute values.
  double* sums;
  void* dscores;  // tied backward: (all tokens, heads) of dt
  void* scratch;  // scratch_bytes()
};

enum class LinearPass {
  forward_queries,
  forward_keys,
  forward_keys_floor,
  backward_keys,
  backward_keys_floor,
  backward_queries
};

struct LinearKernels {
  int64_t (*scratch_bytes)(LinearPass, int64_t heads, int64_t d, int64_t d_v);
  void (*run)(LinearPass, const LinearArgs&, const LinearTask&);
  // Adds up the sums of chunks that lie `size` apart, in their order, in the first of them.
  void (*add_up)(double* sums, int64_t size, int64_t chunks);
  // The largest |sum|; NaN where one is.
  double (*largest)(const double* sums, int64_t n);
  // x_i = factor sums_i / norm * unit, rounded to the accumulation type, and scale x_i of that.
  void (*divide)(const double* sums, int64_t n, double factor, double norm, double unit, void* x, double scale,
                 void* scaled);
  // What a floor adds: sums_i += share mean_i with mean_i = values_i / count, which goes times unit, rounded, to
  // `mean`.
  void (*add_mean)(double* sums, const double* values, int64_t n, double count, double share, double unit, void* mean);
};

}  // namespace infsa::cpu
