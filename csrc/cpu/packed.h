// Packed sequences: the tokens of all batches one behind another, each batch a run of them.
#pragma once

#include <algorithm>
#include <vector>

#include "../check.h"

namespace infsa::cpu {

// Where each sequence begins, and where the last one ends.
struct Offsets {
  std::vector<int64_t> at;

  // S + 1 of them, of so many tokens and no sequence longer than that.
  Offsets(Arguments& a, const char* name, const Tensor& t, int64_t tokens, int64_t longest) : at(t.numel()) {
    const bool wide = t.dtype() == kLong;
    a.demand(wide || t.dtype() == kInt, name, "dtype");
    a.tensor(name, t, t.dtype(), "s");
    for (int64_t i = 0; i < t.numel(); ++i)
      at[i] = wide ? t.const_data_ptr<int64_t>()[i * t.stride(0)] : t.const_data_ptr<int32_t>()[i * t.stride(0)];
    a.demand(!at.empty() && at.front() == 0 && at.back() == tokens, name);
    for (int64_t s = 0; s < sequences(); ++s) a.demand(at[s] <= at[s + 1] && at[s + 1] - at[s] <= longest, name);
  }

  int64_t sequences() const { return static_cast<int64_t>(at.size()) - 1; }
  int64_t longest() const {
    int64_t most = 0;
    for (int64_t s = 0; s < sequences(); ++s) most = std::max(most, at[s + 1] - at[s]);
    return most;
  }
};

// What forward and backward of the packed operators have in common; k is absent where it is tied to q.
struct PackedArguments {
  Arguments a;
  const Offsets queries, keys;

  PackedArguments(const char* op, const Tensor& q, const OptTensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                  const OptTensor& cu_seqlens_k, int64_t max_q, int64_t max_k, double eps, double rho,
                  const OptTensor& head_rho)
      : a(op, "q", q, "NHd"),
        queries(a, "cu_seqlens_q", cu_seqlens_q, q.size(0), max_q),
        keys(a, "cu_seqlens_k", cu_seqlens_k ? *cu_seqlens_k : cu_seqlens_q, (k ? *k : q).size(0), max_k) {
    a.demand(k || !cu_seqlens_k, "cu_seqlens_k");
    a.set('M', keys.at.back());
    a.set('S', queries.sequences());
    a.tensor("k", k, q.dtype(), "MHd");
    a.tensor("v", v, q.dtype(), "MHv");
    a.demand(std::isfinite(eps) && eps > 0, "eps");
    a.demand(std::isfinite(rho), "rho");
    a.tensor("head_rho", head_rho, acc_dtype(q), "SH");
  }

  // As the dense operators have them, N and M those of the longest sequence.
  Sizes sizes() const { return {a['S'], a['H'], queries.longest(), keys.longest(), a['d'], a['v']}; }
};

// Packed tokens (T, H, d) as a batch (S, H, N, d) whose batches all begin at the first token, N those of the longest
// sequence. A gradient of no elements, which nobody wants, stays as it is.
inline Tensor as_batch(const Tensor& t, const Offsets& sequences) {
  if (t.dim() != 3) return t;
  return as_strided(t, {sequences.sequences(), t.size(1), sequences.longest(), t.size(2)},
                    {0, t.stride(1), t.stride(0), t.stride(2)});
}

}  // namespace infsa::cpu
