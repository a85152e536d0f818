// Linear-InfSA on the CPU.
//
//   E = sum_i ||u_i||,  qbar = sum_i ||u_i|| u_i / (E + eps),  r_j = ReLU(qbar . kappa_j),  R = sum_j r_j,
//   context = sum_j r_j v_j / (R + eps),  out = rho head_rho context           u = s q, kappa = s k, s = 1 / sqrt(d)
//
// q (B,H,N,d), k (B,H,M,d), v (B,H,M,d_v); out, context (B,H,d_v), central_query = qbar (B,H,d), energy_sum = E and
// score_sum = R (B,H). Saved for the backward: those four statistics, and the inputs.
//
// With score_floor, a number per call (docs/linear.md), over M keys that no mask ignores:
//
//   T = sum_j |qbar . kappa_j|,  D = R + score_floor T + eps,
//   context = (sum_j r_j v_j + score_floor T value_mean) / D            absolute_sum = T, value_mean = sum_j v_j / M
//
// which the keys' pass sums beside R.
//
// Forward and backward are two passes over the tokens each (linear_kernels.h), in chunks over all threads. Chunks
// depend on the shape alone and their partial sums are added in their order, in double: the same bits for any number of
// threads. A head whose numbers left the range of the accumulation type is run once more (range.h).
#include <array>
#include <tuple>

#include "linear_plan.h"
#include "packed.h"

namespace infsa::cpu::linear {
namespace {

constexpr const char *kOp = "infsa::linear", *kPackedOp = "infsa::linear_varlen";

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Where the batches' tokens begin, if these lie one behind another.
struct Packed {
  const Offsets *queries = nullptr, *keys = nullptr;

  // Queries of a batch.
  int64_t mean(const Sizes& s) const { return queries ? ceil_div(queries->at.back(), std::max<int64_t>(s.B, 1)) : s.N; }
};

// What forward returns, and backward takes; the last two with a floor only.
struct Statistics {
  Tensor context, central_query, energy_sum, score_sum, absolute_sum, value_mean;
};

// The keys of every batch that no mask ignores, at least 1.
std::vector<double> key_counts(const Floor& floor, const Walk& keys, const Mask& mask, const Sizes& s) {
  std::vector<double> counts(s.B, 1);
  for (int64_t b = 0; floor && b < s.B; ++b) {
    const Range of_batch = keys.of_batch(b);
    int64_t count = of_batch.size();
    for (int64_t n = of_batch.begin; mask.data && n < of_batch.end; ++n)
      count -= mask.data[b * mask.batch + n * mask.token];
    counts[b] = std::max<int64_t>(count, 1);
  }
  return counts;
}

// A: the accumulation type.
template <typename A> std::tuple<Tensor, Statistics> forward(const Sizes& s, const Packed& packed, const Tensor& q,
                                                             const Tensor& k, const Tensor& v, double eps,
                                                             const Floor& floor, double rho, const OptTensor& head_rho,
                                                             const OptTensor& key_padding_mask,
                                                             const OptTensor& query_padding_mask) {
  const auto acc = acc_dtype(q);
  const int64_t floored = floor.has_value();
  Tensor out = empty({s.B, s.H, s.d_v}, q.dtype()), context = empty({s.B, s.H, s.d_v}, acc),
         central_query = empty({s.B, s.H, s.d}, acc), energy_sum = empty({s.B, s.H}, acc),
         score_sum = empty({s.B, s.H}, acc), absolute_sum = floor ? empty({s.B, s.H}, acc) : Tensor(),
         value_mean = floor ? empty({s.B, s.H, s.d_v}, acc) : Tensor();

  const Plan plan(s, packed.mean(s), q, k, v);
  const Walk queries(plan, s.N, packed.queries), keys(plan, s.M, packed.keys, 1 + floored);
  const double scale = scale_of(s.d);
  const Buffer score_query(plan.head_bytes(plan.d)), results(plan.head_bytes(s.d_v));
  const Buffer sums_buffer(std::max(queries.sums_bytes(plan.d), keys.sums_bytes(plan.d_v)));
  double* sums = sums_buffer.as<double>();

  LinearArgs args{};
  args.q = rows_of(q), args.k = rows_of(k), args.v = rows_of(v);
  args.query_mask = mask_of(query_padding_mask), args.key_mask = mask_of(key_padding_mask);
  args.H = s.H, args.d = s.d, args.d_v = s.d_v, args.in_cache = plan.in_cache;
  args.score_query = score_query.data();

  const std::vector<double> counts = key_counts(floor, keys, args.key_mask, s);
  Units units(plan, queries, keys, args);
  std::vector<char> strange(s.B * s.H);
  const NumbersOf<A> qbar(central_query), E(energy_sum), R(score_sum), T(absolute_sum), z(context), mean(value_mean),
      query(score_query), result(results);
  const LinearKernels& finish = plan.kernels.linear;
  const auto run = [&](int64_t begin, int64_t end) {
    queries.run(LinearPass::forward_queries, args, begin, end, sums, plan.d, nullptr);
    queries.for_heads(begin, end, sums, plan.d, [&](int64_t head, const auto& rows, const auto& weights) {
      const HeadUnits u = units[head];
      const double* sum = rows(0);
      const double energy = scale * weights(0), norm = energy + eps * u.q, out_of_units = 1 / u.q;
      strange[head] = plan.strange(energy, sum, s.d) & kOutOfRange;
      E.set(head, energy * out_of_units);
      // score_query from qbar as it is saved, as in the backward: scores have the same bits there, and their rounding
      // cancels in r_j / R where few keys share the weight.
      finish.divide(sum, s.d, scale * scale, norm, out_of_units, qbar.from(head * s.d), scale * u.q,
                    query.from(head * plan.d));
      for (int64_t c = s.d; c < plan.d; ++c) query.set(head * plan.d + c, 0);
    });
    keys.run(floor ? LinearPass::forward_keys_floor : LinearPass::forward_keys, args, begin, end, sums, plan.d_v,
             nullptr);
    keys.for_heads(begin, end, sums, plan.d_v, [&](int64_t head, const auto& rows, const auto& weights) {
      const HeadUnits u = units[head];
      const double head_scale = rho_of(rho, head_rho, head / s.H, head % s.H);
      double* sum = rows(0);
      const double* values = floor ? rows(1) : nullptr;
      const double scores = weights(0), absolute = floor ? weights(1) : 0, share = floor.value_or(0) * absolute;
      const double norm = scores + share + eps * u.q * u.k, out_of_units = 1 / u.v;
      strange[head] |= plan.strange(scores, sum, s.d_v);
      R.set(head, scores / u.q / u.k);
      if (floor) {
        strange[head] |= plan.strange(absolute, values, s.d_v);
        T.set(head, absolute / u.q / u.k);
        finish.add_mean(sum, values, s.d_v, counts[head / s.H], share, out_of_units, mean.from(head * s.d_v));
      }
      finish.divide(sum, s.d_v, 1, norm, out_of_units, z.from(head * s.d_v), head_scale, result.from(head * s.d_v));
    });
  };
  plan.for_waves(run);
  const auto set = [&](int64_t head) {
    return (strange[head] & kOutOfRange || units.has_values(head)) && units.set(head);
  };
  plan.for_strange(strange, set, run);
  plan.kernels.tokens.store({out.data_ptr(), s.d_v, 1}, results.data(), s.d_v, s.d_v, 1, {0, s.B * s.H});
  return {std::move(out),
          {std::move(context), std::move(central_query), std::move(energy_sum), std::move(score_sum),
           std::move(absolute_sum), std::move(value_mean)}};
}

// Fills the gradients.
template <typename A> void backward(const Sizes& s, const Packed& packed, const Gradients& gradients,
                                    const Tensor& dout_, const Tensor& q, const Tensor& k, bool tied, const Tensor& v,
                                    const Statistics& saved, double eps, const Floor& floor, double rho,
                                    const OptTensor& head_rho, const OptTensor& key_padding_mask,
                                    const OptTensor& query_padding_mask) {
  const Tensor dout = contiguous(dout_);
  const auto& [dq, dk, dv, dhead_rho] = gradients;
  const bool want_dq = dq.dim() > 1, want_dk = dk.dim() > 1, want_dv = dv.dim() > 1, want_drho = dhead_rho.dim() > 1;

  const Plan plan(s, packed.mean(s), q, k, v);
  const Walk queries(plan, s.N, packed.queries), keys(plan, s.M, packed.keys);
  const double scale = scale_of(s.d);
  const Buffer score_query(plan.head_bytes(plan.d)), query_vector(plan.head_bytes(plan.d)),
      dcontext(plan.head_bytes(plan.d_v));
  const Buffer dcontext_dot(plan.head_bytes(1)), score_scale(plan.head_bytes(1)), query_dot(plan.head_bytes(1));
  const Buffer floor_weight(floor ? plan.head_bytes(1) : 0), floor_gradient(floor ? plan.head_bytes(1) : 0);
  const Buffer sums_buffer(want_dq ? keys.sums_bytes(plan.d) : 0);
  const bool keeps_dscores = tied && want_dq;
  const Buffer dscores_buffer(keeps_dscores ? keys.scalars_bytes() : 0);
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
  args.floor_weight = floor_weight.data(), args.floor_gradient = floor_gradient.data();

  const std::vector<double> counts = key_counts(floor, keys, args.key_mask, s);
  Units units(plan, queries, keys, args);
  std::vector<char> strange(s.B * s.H);
  const NumbersOf<A> dz(contiguous(dout, acc_dtype(q))), z(contiguous(saved.context)),
      qbar(contiguous(saved.central_query)), E(contiguous(saved.energy_sum)), R(contiguous(saved.score_sum)),
      drho(dhead_rho), T(floor ? contiguous(saved.absolute_sum) : Tensor()),
      mean(floor ? contiguous(saved.value_mean) : Tensor());
  // score_floor T, and R + score_floor T + eps
  const auto share = [&](int64_t head) { return floor ? *floor * T[head] : 0; };
  const auto norm = [&](int64_t head) { return R[head] + share(head) + eps; };
  const NumbersOf<A> query(score_query), f(query_vector), f_dot(query_dot), rho_dz(dcontext), rho_dz_dot(dcontext_dot),
      per_score(score_scale), floor_share(floor_weight), floor_slope(floor_gradient);
  const auto prepare = [&](int64_t first, int64_t last) {
    for (int64_t head = first; head < last; ++head) {
      const HeadUnits u = units[head];
      const double head_scale = rho_of(rho, head_rho, head / s.H, head % s.H);
      double dot = 0, towards_mean = 0;
      Largest of_dz, of_z;
      for (int64_t c = 0; c < s.d_v; ++c) {
        const int64_t at = head * s.d_v + c;
        dot += dz[at] * z[at];
        of_dz.of(dz[at]), of_z.of(z[at]);
        if (floor) towards_mean += dz[at] * (mean[at] - z[at]);
        rho_dz.set(head * plan.d_v + c, head_scale * dz[at] * u.dout);
      }
      for (int64_t c = s.d_v; c < plan.d_v; ++c) rho_dz.set(head * plan.d_v + c, 0);
      for (int64_t c = 0; c < s.d; ++c) query.set(head * plan.d + c, scale * qbar[head * s.d + c] * u.q);
      for (int64_t c = s.d; c < plan.d; ++c) query.set(head * plan.d + c, 0);
      // The scores' gradients may vanish though dk, which is theirs times qbar, does not.
      strange[head] =
          !plan.is_factor(E[head]) || !plan.is_factor(R[head]) || !plan.is_sum(of_dz.size * of_z.size / norm(head));
      rho_dz_dot.set(head, head_scale * dot * u.dout * u.v);
      const double of_score = 1 / norm(head) / u.q / u.k * u.score;
      per_score.set(head, of_score);
      if (floor) {
        strange[head] |= !plan.is_factor(T[head]);
        floor_share.set(head, share(head) / norm(head) / counts[head / s.H] * u.score);
        floor_slope.set(head, *floor * head_scale * towards_mean * u.dout * u.v * of_score);
      }
      if (want_drho) drho.set(head, rho * dot);
    }
  };
  const auto run = [&](int64_t begin, int64_t end) {
    keys.run(floor ? LinearPass::backward_keys_floor : LinearPass::backward_keys, args, begin, end, sums, plan.d,
             dscores);
    if (!want_dq) return;
    keys.for_heads(begin, end, sums, plan.d, [&](int64_t head, const auto& rows, const auto&) {
      const HeadUnits u = units[head];
      const double* sum = rows(0);
      const double factor = scale * scale * scale / ((E[head] + eps) * u.q);
      double dot = 0;
      Largest largest;
      for (int64_t c = 0; c < s.d; ++c) {
        const double x = factor * sum[c];
        largest.of(x);
        f.set(head * plan.d + c, x);
        dot += x * qbar[head * s.d + c] * u.q;
      }
      for (int64_t c = s.d; c < plan.d; ++c) f.set(head * plan.d + c, 0);
      strange[head] |= !plan.is_sum(largest.size);
      f_dot.set(head, dot / scale);
    });
    queries.run(LinearPass::backward_queries, args, begin, end, nullptr, 0, dscores);
  };
  parallel_for(0, s.B * s.H, kGrain / (s.d + s.d_v + 1) + 1, prepare);
  if (!(want_dq || want_dk || want_dv)) return;
  plan.for_waves(run);
  plan.for_strange(
      strange, [&](int64_t head) { return units.set(head, &dout, norm(head)); },
      [&](int64_t begin, int64_t end) {
        prepare(begin * plan.heads, end * plan.heads);
        run(begin, end);
      });
}

// Of no elements where they are not wanted; as many of rho as there are of it.
Gradients new_gradients(const std::array<bool, 4>& wanted, const Tensor& q, const OptTensor& k, const Tensor& v,
                        const OptTensor& head_rho) {
  return {new_gradient(wanted[0], q), new_gradient(wanted[1] && k, k ? *k : q), new_gradient(wanted[2], v),
          wanted[3] && head_rho ? empty(head_rho->sizes(), acc_dtype(q)) : empty({0}, acc_dtype(q))};
}

std::tuple<Tensor, Statistics> dense_forward(const Tensor& q, const OptTensor& k, const Tensor& v, double eps,
                                             const Floor& floor, double rho, const OptTensor& head_rho,
                                             const OptTensor& key_mask, const OptTensor& query_mask) {
  const Arguments arguments = attention_arguments(kOp, q, k, v, eps, rho, head_rho, key_mask, query_mask);
  demand_floor(arguments, floor);
  const auto run = acc_dtype(q) == kDouble ? forward<double> : forward<float>;
  return run(sizes_of(arguments), {}, q, k ? *k : q, v, eps, floor, rho, head_rho, key_mask, query_mask);
}

Gradients dense_backward(const Tensor& dout, const Tensor& q, const OptTensor& k, const Tensor& v,
                         const Statistics& saved, double eps, const Floor& floor, double rho, const OptTensor& head_rho,
                         const OptTensor& key_mask, const OptTensor& query_mask,
                         const std::array<bool, 4>& output_mask) {
  Arguments arguments =
      linear_backward_arguments(kOp, dout, q, k, v, saved.context, saved.central_query, saved.energy_sum,
                                saved.score_sum, eps, rho, head_rho, key_mask, query_mask);
  floor_statistics(arguments, floor, q, saved.absolute_sum, saved.value_mean);
  const Gradients gradients = new_gradients(output_mask, q, k, v, head_rho);
  const auto run = acc_dtype(q) == kDouble ? backward<double> : backward<float>;
  run(sizes_of(arguments), {}, gradients, dout, q, k ? *k : q, !k, v, saved, eps, floor, rho, head_rho, key_mask,
      query_mask);
  return gradients;
}

std::tuple<Tensor, Statistics> packed_forward(const Tensor& q, const OptTensor& k, const Tensor& v,
                                              const Tensor& cu_seqlens_q, const OptTensor& cu_seqlens_k, int64_t max_q,
                                              int64_t max_k, double eps, const Floor& floor, double rho,
                                              const OptTensor& head_rho) {
  const PackedArguments p(kPackedOp, q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, rho, head_rho);
  demand_floor(p.a, floor);
  const Tensor queries = as_batch(q, p.queries), keys = k ? as_batch(*k, p.keys) : queries;
  const auto run = acc_dtype(q) == kDouble ? forward<double> : forward<float>;
  return run(p.sizes(), {&p.queries, &p.keys}, queries, keys, as_batch(v, p.keys), eps, floor, rho, head_rho, {}, {});
}

Gradients packed_backward(const Tensor& dout, const Tensor& q, const OptTensor& k, const Tensor& v,
                          const Statistics& saved, const Tensor& cu_seqlens_q, const OptTensor& cu_seqlens_k,
                          int64_t max_q, int64_t max_k, double eps, const Floor& floor, double rho,
                          const OptTensor& head_rho, const std::array<bool, 4>& output_mask) {
  PackedArguments p(kPackedOp, q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, rho, head_rho);
  demand_floor(p.a, floor);
  const auto acc = acc_dtype(q);
  p.a.tensor("dout", dout, q.dtype(), "SHv");
  p.a.tensor("context", saved.context, acc, "SHv");
  p.a.tensor("central_query", saved.central_query, acc, "SHd");
  p.a.tensor("energy_sum", saved.energy_sum, acc, "SH");
  p.a.tensor("score_sum", saved.score_sum, acc, "SH");
  if (floor) {
    p.a.tensor("absolute_sum", saved.absolute_sum, acc, "SH");
    p.a.tensor("value_mean", saved.value_mean, acc, "SHv");
  }
  const Gradients gradients = new_gradients(output_mask, q, k, v, head_rho);
  const auto& [dq, dk, dv, dhead_rho] = gradients;
  const Tensor queries = as_batch(q, p.queries), keys = k ? as_batch(*k, p.keys) : queries;
  const Gradients written{as_batch(dq, p.queries), as_batch(dk, p.keys), as_batch(dv, p.keys), dhead_rho};
  const auto run = acc == kDouble ? backward<double> : backward<float>;
  run(p.sizes(), {&p.queries, &p.keys}, written, dout, queries, keys, !k, as_batch(v, p.keys), saved, eps, floor, rho,
      head_rho, {}, {});
  return gradients;
}

}  // namespace

INFSA_LIBRARY_IMPL(CPU, m) {
  m.impl("linear_fwd", kernel([](const Tensor& q, const OptTensor& k, const Tensor& v, double eps, double rho,
                                 const OptTensor& head_rho, const OptTensor& key_mask, const OptTensor& query_mask) {
           auto [out, s] = dense_forward(q, k, v, eps, {}, rho, head_rho, key_mask, query_mask);
           return std::make_tuple(std::move(out), std::move(s.context), std::move(s.central_query),
                                  std::move(s.energy_sum), std::move(s.score_sum));
         }));
  m.impl("linear_bwd",
         kernel([](const Tensor& dout, const Tensor& q, const OptTensor& k, const Tensor& v, const Tensor& context,
                   const Tensor& central_query, const Tensor& energy_sum, const Tensor& score_sum, double eps,
                   double rho, const OptTensor& head_rho, const OptTensor& key_mask, const OptTensor& query_mask,
                   std::array<bool, 4> output_mask) {
           const Statistics saved{context, central_query, energy_sum, score_sum, {}, {}};
           return dense_backward(dout, q, k, v, saved, eps, {}, rho, head_rho, key_mask, query_mask, output_mask);
         }));
  m.impl("linear_floor_fwd",
         kernel([](const Tensor& q, const OptTensor& k, const Tensor& v, double eps, double score_floor, double rho,
                   const OptTensor& head_rho, const OptTensor& key_mask, const OptTensor& query_mask) {
           auto [out, s] = dense_forward(q, k, v, eps, score_floor, rho, head_rho, key_mask, query_mask);
           return std::make_tuple(std::move(out), std::move(s.context), std::move(s.central_query),
                                  std::move(s.energy_sum), std::move(s.score_sum), std::move(s.absolute_sum),
                                  std::move(s.value_mean));
         }));
  m.impl("linear_floor_bwd",
         kernel([](const Tensor& dout, const Tensor& q, const OptTensor& k, const Tensor& v, const Tensor& context,
                   const Tensor& central_query, const Tensor& energy_sum, const Tensor& score_sum,
                   const Tensor& absolute_sum, const Tensor& value_mean, double eps, double score_floor, double rho,
                   const OptTensor& head_rho, const OptTensor& key_mask, const OptTensor& query_mask,
                   std::array<bool, 4> output_mask) {
           const Statistics saved{context, central_query, energy_sum, score_sum, absolute_sum, value_mean};
           return dense_backward(dout, q, k, v, saved, eps, score_floor, rho, head_rho, key_mask, query_mask,
                                 output_mask);
         }));
  m.impl("linear_varlen_fwd", kernel([](const Tensor& q, const OptTensor& k, const Tensor& v,
                                        const Tensor& cu_seqlens_q, const OptTensor& cu_seqlens_k, int64_t max_q,
                                        int64_t max_k, double eps, double rho, const OptTensor& head_rho) {
           auto [out, s] = packed_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, {}, rho, head_rho);
           return std::make_tuple(std::move(out), std::move(s.context), std::move(s.central_query),
                                  std::move(s.energy_sum), std::move(s.score_sum));
         }));
  m.impl("linear_varlen_bwd",
         kernel([](const Tensor& dout, const Tensor& q, const OptTensor& k, const Tensor& v, const Tensor& context,
                   const Tensor& central_query, const Tensor& energy_sum, const Tensor& score_sum,
                   const Tensor& cu_seqlens_q, const OptTensor& cu_seqlens_k, int64_t max_q, int64_t max_k, double eps,
                   double rho, const OptTensor& head_rho, std::array<bool, 4> output_mask) {
           const Statistics saved{context, central_query, energy_sum, score_sum, {}, {}};
           return packed_backward(dout, q, k, v, saved, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, {}, rho,
                                  head_rho, output_mask);
         }));
  m.impl("linear_varlen_floor_fwd",
         kernel([](const Tensor& q, const OptTensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                   const OptTensor& cu_seqlens_k, int64_t max_q, int64_t max_k, double eps, double score_floor,
                   double rho, const OptTensor& head_rho) {
           auto [out, s] =
               packed_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, score_floor, rho, head_rho);
           return std::make_tuple(std::move(out), std::move(s.context), std::move(s.central_query),
                                  std::move(s.energy_sum), std::move(s.score_sum), std::move(s.absolute_sum),
                                  std::move(s.value_mean));
         }));
  m.impl("linear_varlen_floor_bwd",
         kernel([](const Tensor& dout, const Tensor& q, const OptTensor& k, const Tensor& v, const Tensor& context,
                   const Tensor& central_query, const Tensor& energy_sum, const Tensor& score_sum,
                   const Tensor& absolute_sum, const Tensor& value_mean, const Tensor& cu_seqlens_q,
                   const OptTensor& cu_seqlens_k, int64_t max_q, int64_t max_k, double eps, double score_floor,
                   double rho, const OptTensor& head_rho, std::array<bool, 4> output_mask) {
           const Statistics saved{context, central_query, energy_sum, score_sum, absolute_sum, value_mean};
           return packed_backward(dout, q, k, v, saved, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, score_floor, rho,
                                  head_rho, output_mask);
         }));
}

}  // namespace infsa::cpu::linear
