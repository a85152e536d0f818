// What the compiled raw operators demand of their arguments. Nothing that gets past it makes a kernel read or write
// where it must not; Python says in words what was wrong with a call that was refused (infsa_kernels/ops/check.py).
#pragma once

#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <string_view>

#include "rows.h"
#include "torch.h"

namespace infsa {

// float32, or float64 for float64 input: the dtype of sums and statistics.
inline Dtype acc_dtype(const Tensor& q) { return q.dtype() == kDouble ? kDouble : kFloat; }

// The bytes of memory from a storage's beginning to a tensor's last element.
inline int64_t bytes_to_last(const Tensor& t) {
  int64_t last = t.storage_offset();
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  return (last + 1) * t.element_size();
}

// The arguments of one call, tensor by tensor: each on the device of the first, of one dtype, and with sizes named by
// letters, which the first tensor that has a letter decides for all.
class Arguments {
 public:
  Arguments(const char* op, const char* name, const Tensor& t, std::string_view letters) : op_(op), first_(t) {
    sizes_.fill(-1);
    const Dtype dtype = t.dtype();
    demand(dtype == kFloat || dtype == kBFloat16 || dtype == kHalf || dtype == kDouble, name, "dtype");
    tensor(name, t, dtype, letters);
  }

  void tensor(const char* name, const OptTensor& t, Dtype dtype, std::string_view letters) {
    if (t) tensor(name, *t, dtype, letters);
  }
  void tensor(const char* name, const Tensor& t, Dtype dtype, std::string_view letters) {
    demand(t.dtype() == dtype, name, "dtype");
    demand(t.device() == first_.device(), name, "device");
    demand(t.is_strided() && t.dim() == static_cast<int64_t>(letters.size()), name, "shape");
    for (size_t i = 0; i < letters.size(); ++i) {
      int64_t& size = sizes_[letters[i]];
      if (size < 0) size = t.size(i);
      demand(t.size(i) == size, name, "shape");
    }
    // A storage may have been freed below its tensor, as FSDP does.
    demand(t.numel() == 0 || t.storage_bytes() >= bytes_to_last(t), name, "storage");
  }

  void demand(bool right, const char* name, const char* what = "value") const {
    if (!right) throw std::invalid_argument(std::string(op_) + ": " + name + "'s " + what);
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
  a.tensor("k", k, q.dtype(), "BHMd");
  a.tensor("v", v, q.dtype(), "BHMv");
  a.demand(std::isfinite(eps) && eps > 0, "eps");
  a.demand(std::isfinite(rho), "rho");
  a.tensor("head_rho", head_rho, acc_dtype(q), "BH");
  a.tensor("key_padding_mask", key_padding_mask, kBool, "BM");
  a.tensor("query_padding_mask", query_padding_mask, kBool, "BN");
  return a;
}

// The backward of infsa::linear, on CPUs and GPUs.
inline Arguments linear_backward_arguments(const char* op, const Tensor& dout, const Tensor& q, const OptTensor& k,
                                           const Tensor& v, const Tensor& context, const Tensor& central_query,
                                           const Tensor& energy_sum, const Tensor& score_sum, double eps, double rho,
                                           const OptTensor& head_rho, const OptTensor& key_padding_mask,
                                           const OptTensor& query_padding_mask) {
  Arguments a = attention_arguments(op, q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask);
  a.tensor("dout", dout, q.dtype(), "BHv");
  a.tensor("context", context, acc_dtype(q), "BHv");
  a.tensor("central_query", central_query, acc_dtype(q), "BHd");
  a.tensor("energy_sum", energy_sum, acc_dtype(q), "BH");
  a.tensor("score_sum", score_sum, acc_dtype(q), "BH");
  return a;
}

// score_floor, which the paper's operator does not have.
using Floor = std::optional<double>;

inline void demand_floor(const Arguments& a, const Floor& floor) {
  a.demand(!floor || (std::isfinite(*floor) && *floor >= 0), "score_floor");
}

// The floor, and what a backward pass with one takes beside linear's statistics.
inline void floor_statistics(Arguments& a, const Floor& floor, const Tensor& q, const Tensor& absolute_sum,
                             const Tensor& value_mean) {
  demand_floor(a, floor);
  if (!floor) return;
  a.tensor("absolute_sum", absolute_sum, acc_dtype(q), "BH");
  a.tensor("value_mean", value_mean, acc_dtype(q), "BHv");
}

// What the operators over tokens x (B, N, D) have in common beside these.
inline void token_options(Arguments& a, std::optional<double> norm_eps, double eps, const OptTensor& padding_mask) {
  a.demand(std::isfinite(eps) && eps > 0, "eps");
  a.demand(!norm_eps || (std::isfinite(*norm_eps) && *norm_eps >= 0), "norm_eps");
  a.tensor("padding_mask", padding_mask, kBool, "BN");
}

inline Rows rows_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

inline Mask mask_of(const OptTensor& t) {
  return t ? Mask{t->const_data_ptr<bool>(), t->stride(0), t->stride(1)} : Mask{};
}

// The scale s of queries and of keys.
inline double scale_of(int64_t d) { return d ? 1 / std::sqrt(static_cast<double>(d)) : 1; }

}  // namespace infsa
