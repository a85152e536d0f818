// Linear-InfSA on the CPU.
//
//   E = sum_i ||u_i||,  qbar = sum_i ||u_i|| u_i / (E + eps),  r_j = ReLU(qbar . kappa_j),  R = sum_j r_j,
//   context = sum_j r_j v_j / (R + eps),  out = rho head_rho context           u = s q, kappa = s k, s = 1 / sqrt(d)
//
// q (B,H,N,d), k (B,H,M,d), v (B,H,M,d_v); out, context (B,H,d_v), central_query = qbar (B,H,d), energy_sum = E and
// score_sum = R (B,H). Saved for the backward: those four statistics, and the inputs.
//
// Forward and backward are two passes over the tokens each (linear_kernels.h), in chunks over all threads. Chunks
// depend on the shape alone and their partial sums are added in their order, in double: the same bits for any number of
// threads. A head whose numbers left the range of the accumulation type is run once more (range.h).
#include <torch/library.h>

#include <array>
#include <tuple>
#include <vector>

#include "linear_plan.h"

namespace infsa::cpu {
namespace {

constexpr const char* kOp = "infsa::linear";

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_fwd(const Tensor& q, const OptTensor& k_, const Tensor& v,
                                                              double eps, double rho, const OptTensor& head_rho,
                                                              const OptTensor& key_padding_mask,
                                                              const OptTensor& query_padding_mask) {
  const Sizes s =
      sizes_of(attention_arguments(kOp, q, k_, v, eps, rho, head_rho, key_padding_mask, query_padding_mask));
  const Tensor& k = k_ ? *k_ : q;
  const auto acc = acc_dtype(q);
  const Tensor out = new_cpu({s.B, s.H, s.d_v}, q.scalar_type()), context = new_cpu({s.B, s.H, s.d_v}, acc),
               central_query = new_cpu({s.B, s.H, s.d}, acc), energy_sum = new_cpu({s.B, s.H}, acc),
               score_sum = new_cpu({s.B, s.H}, acc);

  const Plan plan(s, q, k, v);
  const double scale = scale_of(s.d);
  const Buffer score_query(plan.head_bytes(plan.d)), results(plan.head_bytes(s.d_v));
  const Buffer sums_buffer(std::max(plan.sums_bytes(s.N, plan.d), plan.sums_bytes(s.M, plan.d_v)));
  double* sums = sums_buffer.as<double>();

  LinearArgs args{};
  args.q = rows_of(q), args.k = rows_of(k), args.v = rows_of(v);
  args.query_mask = mask_of(query_padding_mask), args.key_mask = mask_of(key_padding_mask);
  args.H = s.H, args.d = s.d, args.d_v = s.d_v;
  args.score_query = score_query.data();

  Units units(plan, args);
  std::vector<char> strange(s.B * s.H);
  const Numbers qbar(central_query), E(energy_sum), R(score_sum), z(context), query = plan.numbers(score_query),
                                                                              result = plan.numbers(results);
  const auto run = [&](int64_t begin, int64_t end) {
    plan.run(LinearPass::forward_queries, args, begin, end, s.N, sums, plan.d, nullptr);
    plan.for_heads(begin, end, s.N, sums, plan.d, [&](int64_t head, const double* sum, double norm_sum) {
      const HeadUnits u = units[head];
      const double energy = scale * norm_sum;
      strange[head] = !plan.is_factor(energy) || !plan.is_sum(sum, 0, s.d);
      E.set(head, energy / u.q);
      for (int64_t c = 0; c < s.d; ++c) {
        qbar.set(head * s.d + c, scale * scale * sum[c] / (energy + eps * u.q) / u.q);
        // From qbar as it is saved, as in the backward: scores have the same bits there, and their rounding cancels
        // in r_j / R where few keys share the weight.
        query.set(head * plan.d + c, scale * qbar[head * s.d + c] * u.q);
      }
      for (int64_t c = s.d; c < plan.d; ++c) query.set(head * plan.d + c, 0);
    });
    plan.run(LinearPass::forward_keys, args, begin, end, s.M, sums, plan.d_v, nullptr);
    plan.for_heads(begin, end, s.M, sums, plan.d_v, [&](int64_t head, const double* sum, double scores) {
      const HeadUnits u = units[head];
      const double head_scale = rho_of(rho, head_rho, head / s.H, head % s.H);
      strange[head] |= !plan.is_factor(scores) || !plan.is_sum(sum, 0, s.d_v);
      R.set(head, scores / u.q / u.k);
      for (int64_t c = 0; c < s.d_v; ++c) {
        const double x = sum[c] / (scores + eps * u.q * u.k) / u.v;
        z.set(head * s.d_v + c, x);
        result.set(head * s.d_v + c, head_scale * x);
      }
    });
  };
  plan.for_waves(run);
  plan.for_strange(strange, [&](int64_t head) { return units.set(head); }, run);
  plan.kernels.tokens.store({out.data_ptr(), s.d_v, 1}, results.data(), s.d_v, s.d_v, 1, {0, s.B * s.H});
  return {out, context, central_query, energy_sum, score_sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_bwd(const Tensor& dout_, const Tensor& q, const OptTensor& k_,
                                                      const Tensor& v, const Tensor& context,
                                                      const Tensor& central_query, const Tensor& energy_sum,
                                                      const Tensor& score_sum, double eps, double rho,
                                                      const OptTensor& head_rho, const OptTensor& key_padding_mask,
                                                      const OptTensor& query_padding_mask,
                                                      std::array<bool, 4> output_mask) {
  const Sizes s = linear_backward_sizes(kOp, dout_, q, k_, v, context, central_query, energy_sum, score_sum, eps, rho,
                                        head_rho, key_padding_mask, query_padding_mask);
  const auto acc = acc_dtype(q);
  const Tensor dout = dout_.contiguous();
  const bool tied = !k_;
  const Tensor& k = tied ? q : *k_;
  const auto [want_dq, want_dk_any, want_dv, want_drho_any] = output_mask;
  const bool want_dk = want_dk_any && !tied, want_drho = want_drho_any && head_rho;
  const Tensor dq = new_gradient(want_dq, q), dk = new_gradient(want_dk, k), dv = new_gradient(want_dv, v);
  const Tensor dhead_rho = want_drho ? new_cpu({s.B, s.H}, acc) : new_cpu({0}, acc);

  const Plan plan(s, q, k, v);
  const double scale = scale_of(s.d);
  const Buffer score_query(plan.head_bytes(plan.d)), query_vector(plan.head_bytes(plan.d)),
      dcontext(plan.head_bytes(plan.d_v));
  const Buffer dcontext_dot(plan.head_bytes(1)), score_scale(plan.head_bytes(1)), query_dot(plan.head_bytes(1));
  const Buffer sums_buffer(want_dq ? plan.sums_bytes(s.M, plan.d) : 0);
  const bool keeps_dscores = tied && want_dq;
  const Buffer dscores_buffer(keeps_dscores ? plan.wave * s.N * plan.heads * plan.acc_bytes : 0);
  double* sums = want_dq ? sums_buffer.as<double>() : nullptr;
  char* dscores = keeps_dscores ? dscores_buffer.data() : nullptr;

  LinearArgs args{};
  args.q = rows_of(q), args.k = rows_of(k), args.v = rows_of(v);
  if (want_dq) args.dq = rows_of(dq);
  if (want_dk) args.dk = rows_of(dk);
  if (want_dv) args.dv = rows_of(dv);
  args.query_mask = mask_of(query_padding_mask), args.key_mask = mask_of(key_padding_mask);
  args.H = s.H, args.d = s.d, args.d_v = s.d_v;
  args.score_query = score_query.data(), args.query_vector = query_vector.data(), args.dcontext = dcontext.data();
  args.dcontext_dot = dcontext_dot.data(), args.score_scale = score_scale.data(), args.query_dot = query_dot.data();

  Units units(plan, args);
  std::vector<char> strange(s.B * s.H);
  const Numbers dz(dout.to(acc)), z(context.contiguous()), qbar(central_query.contiguous()), E(energy_sum.contiguous()),
      R(score_sum.contiguous()), drho(dhead_rho);
  const Numbers query = plan.numbers(score_query), rho_dz = plan.numbers(dcontext), f = plan.numbers(query_vector);
  const auto prepare = [&](int64_t first, int64_t last) {
    for (int64_t head = first; head < last; ++head) {
      const HeadUnits u = units[head];
      const double head_scale = rho_of(rho, head_rho, head / s.H, head % s.H);
      double dot = 0;
      for (int64_t c = 0; c < plan.d_v; ++c) {
        const int64_t at = head * s.d_v + c;
        if (c < s.d_v) dot += dz[at] * z[at];
        rho_dz.set(head * plan.d_v + c, c < s.d_v ? head_scale * dz[at] * u.dout : 0);
      }
      for (int64_t c = 0; c < plan.d; ++c)
        query.set(head * plan.d + c, c < s.d ? scale * qbar[head * s.d + c] * u.q : 0);
      strange[head] = !plan.is_factor(E[head]) || !plan.is_factor(R[head]);
      plan.numbers(dcontext_dot).set(head, head_scale * dot * u.dout * u.v);
      plan.numbers(score_scale).set(head, 1 / (R[head] + eps) / u.q / u.k * u.score);
      if (want_drho) drho.set(head, rho * dot);
    }
  };
  const auto run = [&](int64_t begin, int64_t end) {
    plan.run(LinearPass::backward_keys, args, begin, end, s.M, sums, plan.d, dscores);
    if (!want_dq) return;
    plan.for_heads(begin, end, s.M, sums, plan.d, [&](int64_t head, const double* sum, double) {
      const HeadUnits u = units[head];
      const double factor = scale * scale * scale / ((E[head] + eps) * u.q);
      double dot = 0;
      for (int64_t c = 0; c < plan.d; ++c) {
        f.set(head * plan.d + c, c < s.d ? factor * sum[c] : 0);
        if (c < s.d) dot += factor * sum[c] * qbar[head * s.d + c] * u.q;
      }
      strange[head] |= !plan.is_sum(f, head * plan.d, (head + 1) * plan.d);
      plan.numbers(query_dot).set(head, dot / scale);
    });
    plan.run(LinearPass::backward_queries, args, begin, end, s.N, nullptr, 0, dscores);
  };
  at::parallel_for(0, s.B * s.H, kGrain / (s.d + s.d_v + 1) + 1, prepare);
  if (!(want_dq || want_dk || want_dv)) return {dq, dk, dv, dhead_rho};
  plan.for_waves(run);
  plan.for_strange(
      strange, [&](int64_t head) { return units.set(head, &dout, R[head] + eps); },
      [&](int64_t begin, int64_t end) {
        prepare(begin * plan.heads, end * plan.heads);
        run(begin, end);
      });
  return {dq, dk, dv, dhead_rho};
}

}  // namespace

TORCH_LIBRARY_IMPL(infsa, CPU, m) {
  m.impl("linear_fwd", linear_fwd);
  m.impl("linear_bwd", linear_bwd);
}

}  // namespace infsa::cpu
