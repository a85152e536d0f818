// Linear-InfSA on CUDA tensors: from the raw operators to the launchers of linear.h. Outputs and what is saved are
// those of csrc/cpu/linear.cpp.
#include "linear.h"

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <tuple>

#include "../check.h"
#include "../strides.h"

namespace infsa::cuda {
namespace {

constexpr const char* kOp = "infsa::linear";

using torch::stable::accelerator::DeviceGuard;

Element element_of(const Tensor& q) {
  if (q.dtype() == kDouble)
    throw std::invalid_argument(std::string(kOp) +
                                ": q has dtype torch.float64, expected torch.float32, torch.bfloat16 or torch.float16 "
                                "on this backend; use the eager backend to check gradients");
  return q.dtype() == kFloat ? Element::float32 : q.dtype() == kBFloat16 ? Element::bfloat16 : Element::float16;
}

// What a forward and a backward call share.
LinearArgs arguments_of(const Sizes& s, const Tensor& q, const OptTensor& k, const Tensor& v, double eps, double rho,
                        const OptTensor& head_rho, const OptTensor& key_mask, const OptTensor& query_mask) {
  if (std::max(s.d, s.d_v) > kLargestHeadDim)
    throw std::invalid_argument(std::string(kOp) + ": q and v have " + std::to_string(s.d) + " and " +
                                std::to_string(s.d_v) + " channels, expected at most " +
                                std::to_string(kLargestHeadDim) + " on this backend; use the eager backend");
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
  static std::map<std::tuple<int32_t, Element, bool, bool>, LinearDevice> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [at, is_new] = known.try_emplace({q.device().index, element, aligned, backward});
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
    const Tensor workspace = empty({2, a.plan.parts_size()}, kFloat, q.device());
    a.first_parts = workspace.data_ptr<float>(), a.second_parts = a.first_parts + a.plan.parts_size();
    void* stream;
    succeed(aoti_torch_get_current_cuda_stream(q.device().index, &stream), "name the current stream");
    return launch_linear(a, element, aligned, backward, stream);
  };
  LaunchFailure failure = try_to();
  // The driver speaks of the whole GPU, of which this context may have a part.
  while (failure.too_many_blocks && device.resident_blocks > 1) {
    device.resident_blocks /= 2;
    failure = try_to();
  }
  if (failure.reason) throw std::runtime_error(std::string(kOp) + ": the launch failed: " + failure.reason);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_fwd(const Tensor& q, const OptTensor& k, const Tensor& v,
                                                              double eps, double rho, const OptTensor& head_rho,
                                                              const OptTensor& key_padding_mask,
                                                              const OptTensor& query_padding_mask) {
  const Sizes s = sizes_of(attention_arguments(kOp, q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask));
  const DeviceGuard guard(q.device().index);
  const Device gpu = q.device();
  Tensor out = empty({s.B, s.H, s.d_v}, q.dtype(), gpu), context = empty({s.B, s.H, s.d_v}, kFloat, gpu);
  Tensor central_query = empty({s.B, s.H, s.d}, kFloat, gpu), energy_sum = empty({s.B, s.H}, kFloat, gpu),
         score_sum = empty({s.B, s.H}, kFloat, gpu);
  LinearArgs a = arguments_of(s, q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask);
  a.out = out.data_ptr(), a.context = context.data_ptr<float>();
  a.central_query = central_query.data_ptr<float>();
  a.energy_sum = energy_sum.data_ptr<float>(), a.score_sum = score_sum.data_ptr<float>();
  if (s.B * s.H > 0) launch(a, q, false);
  return {std::move(out), std::move(context), std::move(central_query), std::move(energy_sum), std::move(score_sum)};
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
  const DeviceGuard guard(q.device().index);
  const Tensor context = contiguous(context_), central_query = contiguous(central_query_);
  const Tensor energy_sum = contiguous(energy_sum_), score_sum = contiguous(score_sum_);
  const auto [want_dq, want_dk_any, want_dv, want_drho_any] = output_mask;
  const bool want_dk = want_dk_any && k, want_drho = want_drho_any && head_rho;
  const Device gpu = q.device();
  const auto gradient = [](bool want, const Tensor& t) {
    return want ? empty_like(t) : empty({0}, t.dtype(), t.device());
  };
  Tensor dq = gradient(want_dq, q), dk = gradient(want_dk, k ? *k : q), dv = gradient(want_dv, v);
  Tensor dhead_rho = want_drho ? empty({s.B, s.H}, kFloat, gpu) : empty({0}, kFloat, gpu);
  LinearArgs a = arguments_of(s, q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask);
  a.context = context.data_ptr<float>(), a.central_query = central_query.data_ptr<float>();
  a.energy_sum = energy_sum.data_ptr<float>(), a.score_sum = score_sum.data_ptr<float>();
  a.dout = {dout.data_ptr(), dout.stride(0), dout.stride(1), 0, dout.stride(2)};
  if (want_dq) a.dq = rows_of(dq);
  if (want_dk) a.dk = rows_of(dk);
  if (want_dv) a.dv = rows_of(dv);
  if (want_drho) a.dhead_rho = dhead_rho.data_ptr<float>();
  const Tensor dscores = empty({a.tied && want_dq ? s.B * s.H * s.N : 0}, kFloat, gpu);
  if (dscores.numel() > 0) a.dscores = dscores.data_ptr<float>();
  const bool wanted = want_dq || want_dk || want_dv || want_drho;
  if (wanted && s.B * s.H > 0) launch(a, q, true);
  return {std::move(dq), std::move(dk), std::move(dv), std::move(dhead_rho)};
}

}  // namespace

INFSA_LIBRARY_IMPL(CUDA, m) {
  m.impl("linear_fwd", kernel<linear_fwd>);
  m.impl("linear_bwd", kernel<linear_bwd>);
}

}  // namespace infsa::cuda
