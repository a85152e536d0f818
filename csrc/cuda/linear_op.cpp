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

// What a forward and a backward call share. `floor` is absent from the paper's operator.
LinearArgs arguments_of(const Sizes& s, const Tensor& q, const OptTensor& k, const Tensor& v, double eps,
                        const Floor& floor, double rho, const OptTensor& head_rho, const OptTensor& key_mask,
                        const OptTensor& query_mask) {
  if (std::max(s.d, s.d_v) > kLargestHeadDim)
    throw std::invalid_argument(std::string(kOp) + ": q and v have " + std::to_string(s.d) + " and " +
                                std::to_string(s.d_v) + " channels, expected at most " +
                                std::to_string(kLargestHeadDim) + " on this backend; use the eager backend");
  if (std::max(s.N, s.M) > kMostTokens)
    throw std::invalid_argument(std::string(kOp) + ": more than 2^30 tokens on this backend; use the eager backend");
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
  a.floored = floor.has_value(), a.floor = static_cast<float>(floor.value_or(0));
  a.tied = !k;
  return a;
}

// Asked of the driver once per GPU and kernel: it takes microseconds.
LinearDevice device_of(const Tensor& q, LinearKind kind) {
  static std::mutex mutex;
  static std::map<std::pair<int32_t, LinearKind>, LinearDevice> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [at, is_new] = known.try_emplace({q.device().index, kind});
  if (is_new) at->second = linear_device(kind);
  return at->second;
}

// Plans and launches on the current stream. The caller has made q's device the current one.
void launch(LinearArgs& a, const Tensor& q, bool backward) {
  const Element element = element_of(q);
  const LinearKind kind{element, has_aligned_rows(a, element), backward, a.floored};
  const LaunchFailure failure = launch_where_it_fits(device_of(q, kind), [&](const LinearDevice& device) {
    a.plan = linear_plan(a, element, backward, device);
    // Freed before the kernel ends, by a stream that gives it to nobody who does not wait for that.
    const Tensor workspace = empty({2, a.plan.parts_size()}, kFloat, q.device());
    a.first_parts = workspace.data_ptr<float>(), a.second_parts = a.first_parts + a.plan.parts_size();
    void* stream;
    succeed(aoti_torch_get_current_cuda_stream(q.device().index, &stream), "name the current stream");
    return launch_linear(a, kind, stream);
  });
  if (failure.reason) throw std::runtime_error(std::string(kOp) + ": the launch failed: " + failure.reason);
}

// What forward returns, and backward takes; the last two with a floor only.
struct Statistics {
  Tensor context, central_query, energy_sum, score_sum, absolute_sum, value_mean;

  void give(LinearArgs& a) const {
    a.context = context.data_ptr<float>(), a.central_query = central_query.data_ptr<float>();
    a.energy_sum = energy_sum.data_ptr<float>(), a.score_sum = score_sum.data_ptr<float>();
    if (!a.floored) return;
    a.absolute_sum = absolute_sum.data_ptr<float>(), a.value_mean = value_mean.data_ptr<float>();
  }
};

std::pair<Tensor, Statistics> forward(const Tensor& q, const OptTensor& k, const Tensor& v, double eps,
                                      const Floor& floor, double rho, const OptTensor& head_rho,
                                      const OptTensor& key_mask, const OptTensor& query_mask) {
  const Arguments arguments = attention_arguments(kOp, q, k, v, eps, rho, head_rho, key_mask, query_mask);
  demand_floor(arguments, floor);
  const Sizes s = sizes_of(arguments);
  const DeviceGuard guard(q.device().index);
  const auto floats = [&](std::vector<int64_t> sizes) { return empty(sizes, kFloat, q.device()); };
  Tensor out = empty({s.B, s.H, s.d_v}, q.dtype(), q.device());
  Statistics made{floats({s.B, s.H, s.d_v}), floats({s.B, s.H, s.d}), floats({s.B, s.H}), floats({s.B, s.H})};
  if (floor) made.absolute_sum = floats({s.B, s.H}), made.value_mean = floats({s.B, s.H, s.d_v});
  LinearArgs a = arguments_of(s, q, k, v, eps, floor, rho, head_rho, key_mask, query_mask);
  a.out = out.data_ptr();
  made.give(a);
  if (s.B * s.H > 0) launch(a, q, false);
  return {std::move(out), std::move(made)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Sizes& s, const Tensor& dout, const Tensor& q,
                                                    const OptTensor& k, const Tensor& v, const Statistics& saved,
                                                    double eps, const Floor& floor, double rho,
                                                    const OptTensor& head_rho, const OptTensor& key_mask,
                                                    const OptTensor& query_mask, std::array<bool, 4> output_mask) {
  const DeviceGuard guard(q.device().index);
  const auto [want_dq, want_dk_any, want_dv, want_drho_any] = output_mask;
  const bool want_dk = want_dk_any && k, want_drho = want_drho_any && head_rho;
  const Device gpu = q.device();
  const auto gradient = [](bool want, const Tensor& t) {
    return want ? empty_like(t) : empty({0}, t.dtype(), t.device());
  };
  Tensor dq = gradient(want_dq, q), dk = gradient(want_dk, k ? *k : q), dv = gradient(want_dv, v);
  Tensor dhead_rho = want_drho ? empty({s.B, s.H}, kFloat, gpu) : empty({0}, kFloat, gpu);
  LinearArgs a = arguments_of(s, q, k, v, eps, floor, rho, head_rho, key_mask, query_mask);
  Statistics taken{contiguous(saved.context), contiguous(saved.central_query), contiguous(saved.energy_sum),
                   contiguous(saved.score_sum)};
  if (floor) taken.absolute_sum = contiguous(saved.absolute_sum), taken.value_mean = contiguous(saved.value_mean);
  taken.give(a);
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_fwd(const Tensor& q, const OptTensor& k, const Tensor& v,
                                                              double eps, double rho, const OptTensor& head_rho,
                                                              const OptTensor& key_mask, const OptTensor& query_mask) {
  auto [out, made] = forward(q, k, v, eps, {}, rho, head_rho, key_mask, query_mask);
  return {std::move(out), std::move(made.context), std::move(made.central_query), std::move(made.energy_sum),
          std::move(made.score_sum)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_floor_fwd(
    const Tensor& q, const OptTensor& k, const Tensor& v, double eps, double floor, double rho,
    const OptTensor& head_rho, const OptTensor& key_mask, const OptTensor& query_mask) {
  auto [out, made] = forward(q, k, v, eps, floor, rho, head_rho, key_mask, query_mask);
  return {std::move(out),
          std::move(made.context),
          std::move(made.central_query),
          std::move(made.energy_sum),
          std::move(made.score_sum),
          std::move(made.absolute_sum),
          std::move(made.value_mean)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_bwd(const Tensor& dout, const Tensor& q, const OptTensor& k,
                                                      const Tensor& v, const Tensor& context,
                                                      const Tensor& central_query, const Tensor& energy_sum,
                                                      const Tensor& score_sum, double eps, double rho,
                                                      const OptTensor& head_rho, const OptTensor& key_mask,
                                                      const OptTensor& query_mask, std::array<bool, 4> output_mask) {
  const Arguments arguments = linear_backward_arguments(kOp, dout, q, k, v, context, central_query, energy_sum,
                                                        score_sum, eps, rho, head_rho, key_mask, query_mask);
  return backward(sizes_of(arguments), dout, q, k, v, {context, central_query, energy_sum, score_sum}, eps, {}, rho,
                  head_rho, key_mask, query_mask, output_mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_floor_bwd(
    const Tensor& dout, const Tensor& q, const OptTensor& k, const Tensor& v, const Tensor& context,
    const Tensor& central_query, const Tensor& energy_sum, const Tensor& score_sum, const Tensor& absolute_sum,
    const Tensor& value_mean, double eps, double floor, double rho, const OptTensor& head_rho,
    const OptTensor& key_mask, const OptTensor& query_mask, std::array<bool, 4> output_mask) {
  Arguments arguments = linear_backward_arguments(kOp, dout, q, k, v, context, central_query, energy_sum, score_sum,
                                                  eps, rho, head_rho, key_mask, query_mask);
  floor_statistics(arguments, floor, q, absolute_sum, value_mean);
  return backward(sizes_of(arguments), dout, q, k, v,
                  {context, central_query, energy_sum, score_sum, absolute_sum, value_mean}, eps, floor, rho, head_rho,
                  key_mask, query_mask, output_mask);
}

}  // namespace

INFSA_LIBRARY_IMPL(CUDA, m) {
  m.impl("linear_fwd", kernel<linear_fwd>);
  m.impl("linear_bwd", kernel<linear_bwd>);
  m.impl("linear_floor_fwd", kernel<linear_floor_fwd>);
  m.impl("linear_floor_bwd", kernel<linear_floor_bwd>);
}

}  // namespace infsa::cuda
