// What the compiled raw operators demand of their arguments. Nothing that gets past it makes a kernel read or write
// where it must not; Python says in words what was wrong with a call that was refused (infsa_kernels/ops/check.py).
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <array>
#include <cmath>
#include <optional>
#include <string_view>

#include "rows.h"

namespace infsa {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

// float32, or float64 for float64 input: the dtype of sums and statistics.
inline at::ScalarType acc_dtype(const Tensor& q) { return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// The arguments of one call, tensor by tensor: each on the device of the first, of one dtype, and with sizes named by
// letters, which the first tensor that has a letter decides for all.
class Arguments {
 public:
  Arguments(const char* op, const char* name, const Tensor& t, std::string_view letters) : op_(op), first_(t) {
    sizes_.fill(-1);
    const auto dtype = t.scalar_type();
    demand_dtype(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble, name);
    tensor(name, t, dtype, letters);
  }

  void tensor(const char* name, const OptTensor& t, at::ScalarType dtype, std::string_view letters) {
    if (!t) return;
    demand_dtype(t->scalar_type() == dtype, name);
    demand(t->device() == first_.device(), name, "device");
    demand(t->layout() == at::kStrided && t->dim() == static_cast<int64_t>(letters.size()), name, "shape");
    for (size_t i = 0; i < letters.size(); ++i) {
      int64_t& size = sizes_[letters[i]];
      if (size < 0) size = t->size(i);
      demand(t->size(i) == size, name, "shape");
    }
    // A storage may have been freed below its tensor, as FSDP does.
    const size_t bytes = at::detail::computeStorageNbytes(t->sizes(), t->strides(), t->itemsize(), t->storage_offset());
    demand(t->numel() == 0 || t->storage().nbytes() >= bytes, name, "storage");
  }

  void demand_dtype(bool right, const char* name) const { TORCH_CHECK_TYPE(right, op_, ": ", name, "'s dtype"); }
  void demand(bool right, const char* name, const char* what = "value") const {
    TORCH_CHECK_VALUE(right, op_, ": ", name, "'s ", what);
  }

  int64_t operator[](char letter) const { return sizes_[letter]; }
  void set(char letter, int64_t size) { sizes_[letter] = size; }

 private:
  const char* op_;
  const Tensor& first_;
  std::array<int64_t, 128> sizes_;
};

// Sizes of one call: q (B,H,N,d), k (B,H,M,d), v (B,H,M,d_v).
struct Sizes {
  int64_t B, H, N, M, d, d_v;
};

inline Sizes sizes_of(const Arguments& a) { return {a['B'], a['H'], a['N'], a['M'], a['d'], a['v']}; }

// What forward and backward of infsa::linear and infsa::pure have in common; k is absent where it is tied to q.
inline Arguments attention_arguments(const char* op, const Tensor& q, const OptTensor& k, const Tensor& v, double eps,
                                     double rho, const OptTensor& head_rho, const OptTensor& key_padding_mask,
                                     const OptTensor& query_padding_mask) {
  Arguments a(op, "q", q, "BHNd");
  if (!k) a.set('M', a['N']);
  a.tensor("k", k, q.scalar_type(), "BHMd");
  a.tensor("v", v, q.scalar_type(), "BHMv");
  a.demand(std::isfinite(eps) && eps > 0, "eps");
  a.demand(std::isfinite(rho), "rho");
  a.tensor("head_rho", head_rho, acc_dtype(q), "BH");
  a.tensor("key_padding_mask", key_padding_mask, at::kBool, "BM");
  a.tensor("query_padding_mask", query_padding_mask, at::kBool, "BN");
  return a;
}

// The backward of infsa::linear, on CPUs and GPUs.
inline Arguments linear_backward_arguments(const char* op, const Tensor& dout, const Tensor& q, const OptTensor& k,
                                           const Tensor& v, const Tensor& context, const Tensor& central_query,
                                           const Tensor& energy_sum, const Tensor& score_sum, double eps, double rho,
                                           const OptTensor& head_rho, const OptTensor& key_padding_mask,
                                           const OptTensor& query_padding_mask) {
  Arguments a = attention_arguments(op, q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask);
  a.tensor("dout", dout, q.scalar_type(), "BHv");
  a.tensor("context", context, acc_dtype(q), "BHv");
  a.tensor("central_query", central_query, acc_dtype(q), "BHd");
  a.tensor("energy_sum", energy_sum, acc_dtype(q), "BH");
  a.tensor("score_sum", score_sum, acc_dtype(q), "BH");
  return a;
}

// What the operators over tokens x (B, N, D) have in common beside these.
inline void token_options(Arguments& a, std::optional<double> norm_eps, double eps, const OptTensor& padding_mask) {
  a.demand(std::isfinite(eps) && eps > 0, "eps");
  a.demand(!norm_eps || (std::isfinite(*norm_eps) && *norm_eps >= 0), "norm_eps");
  a.tensor("padding_mask", padding_mask, at::kBool, "BN");
}

inline Rows rows_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

inline Mask mask_of(const OptTensor& t) {
  return t ? Mask{t->const_data_ptr<bool>(), t->stride(0), t->stride(1)} : Mask{};
}

// The scale s of queries and of keys.
inline double scale_of(int64_t d) { return d ? 1 / std::sqrt(static_cast<double>(d)) : 1; }

}  // namespace infsa
