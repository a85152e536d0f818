// Argument checks of the raw operators over tokens x (B, N, D), as check.h has them for q, k and v.
//
// The same checks, with the same words, stand in infsa_kernels/ops/_check_tokens.py for the backends written in Python
// and for fake tensors.
#pragma once

#include "check.h"

namespace infsa::check {

inline void rank3(const char* op, const char* name, const Tensor& t, const char* letters) {
  TORCH_CHECK_VALUE(t.dim() == 3, op, ": ", name, " has shape ", t.sizes(), ", expected ", letters,
                    "; view it with 3 dimensions");
}

inline void token_arguments(const char* op, const Tensor& x, std::optional<double> norm_eps, double eps,
                            const OptTensor& padding_mask) {
  positive_eps(op, eps);
  TORCH_CHECK_VALUE(!norm_eps || (std::isfinite(*norm_eps) && *norm_eps >= 0), op, ": norm_eps is ", *norm_eps,
                    ", expected a finite number of at least 0, or None for no normalisation");
  mask(op, "padding_mask", padding_mask, x, {x.size(0), x.size(1)}, "(B, N)", "x");
}

// weight (H, d, D), bias (H, d)
inline void central_query_arguments(const char* op, const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                    std::optional<double> norm_eps, double eps, const OptTensor& padding_mask) {
  floating(op, "x", x);
  dtype(op, "weight", weight, x.scalar_type());
  device(op, "weight", weight, x, "x");
  rank3(op, "x", x, "(B, N, D)");
  rank3(op, "weight", weight, "(H, d, D)");
  const int64_t H = weight.size(0), d = weight.size(1);
  shape(op, "weight", weight, {H, d, x.size(2)}, "(H, d, D)");
  if (bias) statistic(op, "bias", *bias, x, {H, d}, "(H, d)", "x");
  token_arguments(op, x, norm_eps, eps, padding_mask);
}

// keys (B, H, D), key_bias (B, H)
inline void score_pool_arguments(const char* op, const Tensor& x, const Tensor& keys, const OptTensor& key_bias,
                                 std::optional<double> norm_eps, double eps, const OptTensor& padding_mask) {
  floating(op, "x", x);
  dtype(op, "keys", keys, acc_dtype(x));
  device(op, "keys", keys, x, "x");
  rank3(op, "x", x, "(B, N, D)");
  rank3(op, "keys", keys, "(B, H, D)");
  const int64_t B = x.size(0), H = keys.size(1);
  shape(op, "keys", keys, {B, H, x.size(2)}, "(B, H, D)");
  if (key_bias) statistic(op, "key_bias", *key_bias, x, {B, H}, "(B, H)", "x");
  token_arguments(op, x, norm_eps, eps, padding_mask);
}

}  // namespace infsa::check
