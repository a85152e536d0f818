// Argument checks of the raw operators, shared by the CPU and CUDA sources.
//
// The same checks, with the same words, stand in infsa_kernels/ops/_check.py for the backends written in Python and for
// fake tensors; tests/ops/test_bad_input.py holds the two together.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <optional>
#include <string>

namespace infsa {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

// Sizes of one call: q (B,H,N,d), k (B,H,M,d), v (B,H,M,dv).
struct Sizes {
  int64_t B, H, N, M, d, dv;
};

// float32, or float64 for float64 input: the dtype of the statistics and of head_rho.
inline at::ScalarType acc_dtype(const Tensor& q) { return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

namespace check {

inline std::string dtype_name(at::ScalarType dtype) { return "torch." + std::string(c10::getDtypeNames(dtype).first); }

inline void dtype(const char* op, const char* name, const Tensor& t, at::ScalarType expected) {
  TORCH_CHECK_TYPE(t.scalar_type() == expected, op, ": ", name, " has dtype ", dtype_name(t.scalar_type()),
                   ", expected ", dtype_name(expected), "; convert it with .to(", dtype_name(expected), ")");
}

inline void device(const char* op, const char* name, const Tensor& t, const Tensor& q, const char* like = "q") {
  TORCH_CHECK_VALUE(t.device() == q.device(), op, ": ", name, " is on ", t.device(), ", expected ", q.device(),
                    ", where ", like, " is; move it with .to(", like, ".device)");
}

inline void floating(const char* op, const char* name, const Tensor& t) {
  const auto dtype = t.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble, op,
                   ": ", name, " has dtype ", dtype_name(dtype),
                   ", expected torch.float32, torch.bfloat16, torch.float16 or torch.float64; convert it with .to()");
}

inline void positive_eps(const char* op, double eps) {
  TORCH_CHECK_VALUE(std::isfinite(eps) && eps > 0, op, ": eps is ", eps,
                    ", expected a finite number above 0; the paper's is 1e-6");
}

inline void rank(const char* op, const char* name, const Tensor& t, const char* letters) {
  TORCH_CHECK_VALUE(t.dim() == 4, op, ": ", name, " has shape ", t.sizes(), ", expected ", letters,
                    "; view it with 4 dimensions");
}

inline void shape(const char* op, const char* name, const Tensor& t, at::IntArrayRef expected, const char* letters) {
  TORCH_CHECK_VALUE(t.sizes() == expected, op, ": ", name, " has shape ", t.sizes(), ", expected ", letters, " = ",
                    expected, "; broadcasting is not implied, use .expand()");
}

// A float32/float64 tensor that an op made and takes back, or head_rho.
inline void statistic(const char* op, const char* name, const Tensor& t, const Tensor& q, at::IntArrayRef expected,
                      const char* letters, const char* like = "q") {
  dtype(op, name, t, acc_dtype(q));
  device(op, name, t, q, like);
  shape(op, name, t, expected, letters);
}

inline void mask(const char* op, const char* name, const OptTensor& t, const Tensor& q, at::IntArrayRef expected,
                 const char* letters, const char* like = "q") {
  if (!t) return;
  dtype(op, name, *t, at::kBool);
  device(op, name, *t, q, like);
  shape(op, name, *t, expected, letters);
}

// Every argument that forward and backward have in common; k is absent where it is tied to q.
inline Sizes forward_arguments(const char* op, const Tensor& q, const OptTensor& k, const Tensor& v, double eps,
                               double rho, const OptTensor& head_rho, const OptTensor& key_padding_mask,
                               const OptTensor& query_padding_mask) {
  floating(op, "q", q);
  if (k) dtype(op, "k", *k, q.scalar_type());
  dtype(op, "v", v, q.scalar_type());
  if (k) device(op, "k", *k, q);
  device(op, "v", v, q);

  rank(op, "q", q, "(B, H, N, d)");
  if (k) rank(op, "k", *k, "(B, H, M, d)");
  rank(op, "v", v, "(B, H, M, dv)");
  const Sizes s{q.size(0), q.size(1), q.size(2), k ? k->size(2) : q.size(2), q.size(3), v.size(3)};
  if (k) shape(op, "k", *k, {s.B, s.H, s.M, s.d}, "(B, H, M, d)");
  shape(op, "v", v, {s.B, s.H, s.M, s.dv}, "(B, H, M, dv)");

  positive_eps(op, eps);
  TORCH_CHECK_VALUE(std::isfinite(rho), op, ": rho is ", rho, ", expected a finite number; the paper's is 0.95");
  if (head_rho) statistic(op, "head_rho", *head_rho, q, {s.B, s.H}, "(B, H)");
  mask(op, "key_padding_mask", key_padding_mask, q, {s.B, s.M}, "(B, M)");
  mask(op, "query_padding_mask", query_padding_mask, q, {s.B, s.N}, "(B, N)");
  return s;
}

}  // namespace check
}  // namespace infsa
