// Linear-InfSA on CUDA tensors: from the raw operators to the launchers of linear.h. Outputs and what is saved are
// those of csrc/cpu/linear.cpp.
#include "linear.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <tuple>

#include "../check.h"

namespace infsa::cuda {
namespace {

constexpr const char* kOp = "infsa::linear";

Element element_of(const Tensor& q) {
  TORCH_CHECK_TYPE(
      q.scalar_type() != at::kDouble, kOp,
      ": q has dtype torch.float64, expected torch.float32, torch.bfloat16 or torch.float16 on this backend; "
      "use the eager backend to check gradients");
  return q.scalar_type() == at::kFloat      ? Element::float32
         : q.scalar_type() == at::kBFloat16 ? Element::bfloat16
                                            : Element::float16;
}

// What a forward and a backward call share.
LinearArgs arguments_of(const Sizes& s, const Tensor& q, const OptTensor& k, const Tensor& v, double eps, double rho,
                        const OptTensor& head_rho, const OptTensor& key_mask, const OptTensor& query_mask) {
  TORCH_CHECK_VALUE(std::max(s.d, s.d_v) <= kLargestHeadDim, kOp, ": q and v have ", s.d, " and ", s.d_v,
                    " channels, expected at most ", kLargestHeadDim, " on this backend; use the eager backend");
  LinearArgs a{};
  a.q = rows_of(q), a.k = rows_of(k ? *k : q), a.v = rows_of(v);
  a.query_mask = mask_of(query_mask), a.key_mask = mask_of(key_mask);
  if (head_rho) {
    a.head_rho = head_rho->const_data_ptr<float>(), a.rho_b = head_rho->stride(0), a.rho_h = head_rho->stride(1);
  }
  a.B = s.B, a.H = s.H, a.N = s.N, a.M = s.M;
  a.d = static_cast<int>(s.d), a.d_v = static_cast<int>(s.d_v);
  a.scale = static_cast<float>(scale_of(s.d));
  a.eps = static_cast<float>(eps), a.rho = static_cast<float>(rho);
  a.tied = !k;
  return a;
}

// Asked of the driver once per GPU and kernel: it takes microseconds.
LinearDevice device_of(const Tensor& q, Element element, bool aligned, bool backward) {
  static std::mutex mutex;
  static std::map<std::tuple<int, Element, bool, bool>, LinearDevice> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [at, is_new] = known.try_emplace({q.get_device(), element, aligned, backward});
  if (is_new) at->second = linear_device(element, aligned, backward);
  return at->second;
}

// Plans and launches on the current stream. The caller has made q's device the current one.
void launch(LinearArgs& a, const Tensor& q, bool backward) {
  const Element element = element_of(q);
  const bool aligned = has_aligned_rows(a, element);
  LinearDevice device = device_of(q, element, aligned, backward);
  const auto try_to = [&] {
    a.plan = linear_plan(a, element, backward, device);
    // Freed before the kernel ends, by a stream that gives it to nobody who does not wait for that.
    const auto workspace = at::empty({2, a.plan.parts_size()}, q.options().dtype(at::kFloat));
    a.first_parts = workspace.mutable_data_ptr<float>(), a.second_parts = a.first_parts + a.plan.parts_size();
    return launch_linear(a, element, aligned, backward, c10::cuda::getCurrentCUDAStream().stream());
  };
  LaunchFailure failure = try_to();
  // The driver speaks of the whole GPU, of which this context may have a part.
  while (failure.too_many_blocks && device.resident_blocks > 1) {
    device.resident_blocks /= 2;
    failure = try_to();
  }
  TORCH_CHECK(!failure.reason, kOp, ": the launch failed: ", failure.reason);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_fwd(const Tensor& q, const OptTensor& k, const Tensor& v,
                                                              double eps, double rho, const OptTensor& head_rho,
                                                              const OptTensor& key_padding_mask,
                                                              const OptTensor& query_padding_mask) {
  const Sizes s = sizes_of(attention_arguments(kOp, q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask));
  const c10::cuda::CUDAGuard guard(q.device());
  const auto float32 = q.options().dtype(at::kFloat);
  Tensor out = at::empty({s.B, s.H, s.d_v}, q.options()), context = at::empty({s.B, s.H, s.d_v}, float32);
  Tensor central_query = at::empty({s.B, s.H, s.d}, float32), energy_sum = at::empty({s.B, s.H}, float32),
         score_sum = at::empty({s.B, s.H}, float32);
  LinearArgs a = arguments_of(s, q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask);
  a.out = out.mutable_data_ptr(), a.context = context.mutable_data_ptr<float>();
  a.central_query = central_query.mutable_data_ptr<float>();
  a.energy_sum = energy_sum.mutable_data_ptr<float>(), a.score_sum = score_sum.mutable_data_ptr<float>();
  if (s.B * s.H > 0) launch(a, q, false);
  return {out, context, central_query, energy_sum, score_sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_bwd(const Tensor& dout, const Tensor& q, const OptTensor& k,
                                                      const Tensor& v, const Tensor& context_,
                                                      const Tensor& central_query_, const Tensor& energy_sum_,
                                                      const Tensor& score_sum_, double eps, double rho,
                                                      const OptTensor& head_rho, const OptTensor& key_padding_mask,
                                                      const OptTensor& query_padding_mask,
                                                      std::array<bool, 4> output_mask) {
  const Sizes s =
      sizes_of(linear_backward_arguments(kOp, dout, q, k, v, context_, central_query_, energy_sum_, score_sum_, eps,
                                         rho, head_rho, key_padding_mask, query_padding_mask));
  const c10::cuda::CUDAGuard guard(q.device());
  const Tensor context = context_.contiguous(), central_query = central_query_.contiguous();
  const Tensor energy_sum = energy_sum_.contiguous(), score_sum = score_sum_.contiguous();
  const auto [want_dq, want_dk_any, want_dv, want_drho_any] = output_mask;
  const bool want_dk = want_dk_any && k, want_drho = want_drho_any && head_rho;
  const auto float32 = q.options().dtype(at::kFloat);
  const auto gradient = [](bool want, const Tensor& t) {
    return want ? at::empty_like(t) : at::empty({0}, t.options());
  };
  Tensor dq = gradient(want_dq, q), dk = gradient(want_dk, k ? *k : q), dv = gradient(want_dv, v);
  Tensor dhead_rho = want_drho ? at::empty({s.B, s.H}, float32) : at::empty({0}, float32);
  LinearArgs a = arguments_of(s, q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask);
  a.context = context.data_ptr<float>(), a.central_query = central_query.data_ptr<float>();
  a.energy_sum = energy_sum.data_ptr<float>(), a.score_sum = score_sum.data_ptr<float>();
  a.dout = {dout.data_ptr(), dout.stride(0), dout.stride(1), 0, dout.stride(2)};
  if (want_dq) a.dq = rows_of(dq);
  if (want_dk) a.dk = rows_of(dk);
  if (want_dv) a.dv = rows_of(dv);
  if (want_drho) a.dhead_rho = dhead_rho.mutable_data_ptr<float>();
  const auto dscores = at::empty({a.tied && want_dq ? s.B * s.H * s.N : 0}, float32);
  if (dscores.numel() > 0) a.dscores = dscores.mutable_data_ptr<float>();
  const bool wanted = want_dq || want_dk || want_dv || want_drho;
  if (wanted && s.B * s.H > 0) launch(a, q, true);
  return {dq, dk, dv, dhead_rho};
}

}  // namespace

TORCH_LIBRARY_IMPL(infsa, CUDA, m) {
  m.impl("linear_fwd", linear_fwd);
  m.impl("linear_bwd", linear_bwd);
}

}  // namespace infsa::cuda
