// Linear-InfSA on the CPU in four steps, for a call that has some of the tokens only: between two steps somebody adds
// up what each part gave (infsa_kernels/ops/linear_steps.py).
//
//   queries forward   sum_i e_i u_i, sum_i e_i                      e_i = ||u_i||          u = s q, kappa = s k
//   keys forward      sum_j r_j v_j, sum_j r_j                      r_j = ReLU(qbar . kappa_j)
//   keys backward     dv_j = r_j / R dz,  dk_j = s dt_j qbar,  sum_j dt_j kappa_j
//                                                                   dt_j = [r_j > 0] (dz . v_j - dz . context) / R
//   queries backward  dq_i = s (w_i dqbar + (u_i - qbar) . dqbar / E u_i / e_i)            and + s dt_i qbar, if tied
//
// With a floor the keys' steps give sum_j v_j and sum_j |t_j| too, and take what these are over all parts (linear.cpp).
//
// The passes are those of linear.cpp. Sums are float64: of float32 rows they stay in range, whoever has which part.
#include <array>
#include <tuple>
#include <vector>

#include "linear_plan.h"

namespace infsa::cpu::linear {
namespace {

constexpr const char* kOp = "infsa::linear";

// Of a step over the queries: k and v are not there. Two equal widths choose the kernels of a constant one.
Sizes sizes_of_queries(const Arguments& a) { return {a['B'], a['H'], a['N'], 0, a['d'], a['d']}; }
// Of one over the keys.
Sizes sizes_of_keys(const Arguments& a) { return {a['B'], a['H'], 0, a['M'], a['d'], a['v']}; }

Arguments keys_arguments(const Tensor& k, const Tensor& v, const Tensor& central_query,
                         const OptTensor& key_padding_mask) {
  Arguments a(kOp, "k", k, "BHMd");
  a.tensor("v", v, k.dtype(), "BHMv");
  a.tensor("central_query", central_query, acc_dtype(k), "BHd");
  a.tensor("key_padding_mask", key_padding_mask, kBool, "BM");
  return a;
}

// The power of two that brings n numbers to order one; 0 where one is not finite.
double unit_of_numbers(const Numbers& x, int64_t from, int64_t n, bool wide) {
  double most = 0;
  for (int64_t i = from; i < from + n; ++i) {
    if (!std::isfinite(x[i])) return 0;
    most = std::max(most, std::abs(x[i]));
  }
  return unit_of(most, wide);
}

Tensor linear_queries_fwd(const Tensor& q, const OptTensor& query_padding_mask) {
  Arguments a(kOp, "q", q, "BHNd");
  a.tensor("query_padding_mask", query_padding_mask, kBool, "BN");
  const Sizes s = sizes_of_queries(a);
  const Tensor result = empty({s.B, s.H, s.d + 1}, kDouble);
  double* to = result.data_ptr<double>();

  const Plan plan(s, s.N, q, q, q);
  const Walk queries(plan, s.N, nullptr), keys(plan, 0, nullptr);
  const double scale = scale_of(s.d);
  const Buffer sums_buffer(queries.sums_bytes(plan.d));
  double* sums = sums_buffer.as<double>();
  LinearArgs args{};
  args.q = rows_of(q), args.query_mask = mask_of(query_padding_mask);
  args.H = s.H, args.d = s.d, args.d_v = s.d_v, args.in_cache = plan.in_cache;

  Units units(plan, queries, keys, args);
  std::vector<char> strange(s.B * s.H);
  const auto run = [&](int64_t begin, int64_t end) {
    queries.run(LinearPass::forward_queries, args, begin, end, sums, plan.d, nullptr);
    queries.for_heads(begin, end, sums, plan.d, [&](int64_t head, const auto& sums_of, const auto& weights_of) {
      const double* sum = sums_of(0);
      const double norm_sum = weights_of(0);
      const HeadUnits u = units[head];
      strange[head] = plan.strange(scale * norm_sum, sum, s.d) & kOutOfRange;
      double* of_head = to + head * (s.d + 1);
      for (int64_t c = 0; c < s.d; ++c) of_head[c] = scale * sum[c] / u.q * scale / u.q;
      of_head[s.d] = scale * norm_sum / u.q;
    });
  };
  plan.for_waves(run);
  plan.for_strange(strange, [&](int64_t head) { return units.set(head); }, run);
  return result;
}

// s qbar in the units of a head, as the passes over the keys take it.
void set_score_query(const Plan& plan, const Numbers& qbar, const Units& units, const Numbers& query, int64_t begin,
                     int64_t end) {
  const double scale = scale_of(plan.s.d);
  for (int64_t head = begin; head < end; ++head) {
    for (int64_t c = 0; c < plan.d; ++c)
      query.set(head * plan.d + c, c < plan.s.d ? scale * qbar[head * plan.s.d + c] * units[head].q : 0);
  }
}

// kFloor: sum_j v_j and sum_j |t_j| behind the other two.
template <bool kFloor> Tensor linear_keys_fwd(const Tensor& k, const Tensor& v, const Tensor& central_query,
                                              const OptTensor& key_padding_mask) {
  constexpr int64_t kKinds = kFloor ? 2 : 1;
  const Sizes s = sizes_of_keys(keys_arguments(k, v, central_query, key_padding_mask));
  const Tensor result = empty({s.B, s.H, kKinds * (s.d_v + 1)}, kDouble);
  double* to = result.data_ptr<double>();

  const Plan plan(s, 0, k, k, v);
  const Walk queries(plan, 0, nullptr), keys(plan, s.M, nullptr, kKinds);
  const Buffer score_query(plan.head_bytes(plan.d)), sums_buffer(keys.sums_bytes(plan.d_v));
  double* sums = sums_buffer.as<double>();
  LinearArgs args{};
  args.k = rows_of(k), args.v = rows_of(v), args.key_mask = mask_of(key_padding_mask);
  args.H = s.H, args.d = s.d, args.d_v = s.d_v, args.in_cache = plan.in_cache;
  args.score_query = score_query.data();

  Units units(plan, queries, keys, args);
  std::vector<char> strange(s.B * s.H);
  const Numbers qbar(contiguous(central_query)), query = plan.numbers(score_query);
  const auto run = [&](int64_t begin, int64_t end) {
    set_score_query(plan, qbar, units, query, begin * plan.heads, end * plan.heads);
    keys.run(kFloor ? LinearPass::forward_keys_floor : LinearPass::forward_keys, args, begin, end, sums, plan.d_v,
             nullptr);
    const auto finish = [&](int64_t head, const auto& sums_of, const auto& weights_of) {
      const HeadUnits u = units[head];
      strange[head] = 0;
      double* of_head = to + head * kKinds * (s.d_v + 1);
      for (int64_t kind = 0; kind < kKinds; ++kind) {
        const double *sum = sums_of(kind), weights = weights_of(kind);
        strange[head] |= plan.strange(weights, sum, s.d_v);
        for (int64_t c = 0; c < s.d_v; ++c) *of_head++ = (kind ? sum[c] : sum[c] / u.q / u.k) / u.v;
        *of_head++ = weights / u.q / u.k;
      }
    };
    keys.for_heads(begin, end, sums, plan.d_v, finish);
  };
  const auto set = [&](int64_t head) {
    if (!(strange[head] & kOutOfRange) && !units.has_values(head)) return false;
    HeadUnits u = units.measure(head);
    u.q = unit_of_numbers(qbar, head * s.d, s.d, plan.wide);
    return units.install(head, u);
  };
  plan.for_waves(run);
  plan.for_strange(strange, set, run);
  return result;
}

// Of all parts, with a floor.
struct Floor {
  Tensor absolute_sum, value_mean, key_count;
  double score_floor;
};

using KeyGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

KeyGradients keys_bwd(const Tensor& dcontext_, const Tensor& k, const Tensor& v, const Tensor& context,
                      const Tensor& central_query, const Tensor& score_sum, const std::optional<Floor>& floor,
                      double eps, const OptTensor& key_padding_mask, const std::array<bool, 4>& output_mask) {
  Arguments a = keys_arguments(k, v, central_query, key_padding_mask);
  const Dtype acc = acc_dtype(k);
  a.tensor("dcontext", dcontext_, acc, "BHv");
  a.tensor("context", context, acc, "BHv");
  a.tensor("score_sum", score_sum, kDouble, "BH");
  a.demand(std::isfinite(eps) && eps > 0, "eps");
  if (floor) {
    a.tensor("absolute_sum", floor->absolute_sum, kDouble, "BH");
    a.tensor("value_mean", floor->value_mean, acc, "BHv");
    a.tensor("key_count", floor->key_count, kDouble, "BH");
    a.demand(std::isfinite(floor->score_floor) && floor->score_floor >= 0, "score_floor");
  }
  const Sizes s = sizes_of_keys(a);
  const auto [want_dk, want_dv, want_dcentral, want_dscores] = output_mask;
  const Tensor dk = new_gradient(want_dk, k), dv = new_gradient(want_dv, v);
  const Tensor dcentral = want_dcentral ? empty({s.B, s.H, s.d}, kDouble) : empty({0}, kDouble);

  const Plan plan(s, 0, k, k, v);
  const Walk queries(plan, 0, nullptr), keys(plan, s.M, nullptr);
  const double scale = scale_of(s.d);
  const Buffer score_query(plan.head_bytes(plan.d)), dcontext(plan.head_bytes(plan.d_v)),
      dcontext_dot(plan.head_bytes(1)), score_scale(plan.head_bytes(1));
  const Buffer floor_weight(floor ? plan.head_bytes(1) : 0), floor_gradient(floor ? plan.head_bytes(1) : 0);
  // The pass that sums them makes the scores' gradients.
  const bool want_sums = want_dcentral || want_dscores;
  const Buffer sums_buffer(want_sums ? keys.sums_bytes(plan.d) : 0);
  double* sums = want_sums ? sums_buffer.as<double>() : nullptr;
  // In the order in which the passes go over tokens and heads.
  const int64_t token = plan.heads > 1 ? s.H : 1, of_head = plan.heads > 1 ? 1 : s.M;
  const Tensor dscores = want_dscores ? new_tensor({s.B, s.H, s.M}, {s.H * s.M, of_head, token}, acc) : empty({0}, acc);
  char* scores = want_dscores ? static_cast<char*>(dscores.data_ptr()) : nullptr;

  LinearArgs args{};
  args.k = rows_of(k), args.v = rows_of(v), args.key_mask = mask_of(key_padding_mask);
  if (want_dk) args.dk = rows_of(dk);
  if (want_dv) args.dv = rows_of(dv);
  args.H = s.H, args.d = s.d, args.d_v = s.d_v;
  args.score_query = score_query.data(), args.dcontext = dcontext.data();
  args.dcontext_dot = dcontext_dot.data(), args.score_scale = score_scale.data();
  args.floor_weight = floor_weight.data(), args.floor_gradient = floor_gradient.data();

  Units units(plan, queries, keys, args);
  std::vector<char> strange(s.B * s.H);
  const Numbers dz(contiguous(dcontext_)), z(contiguous(context)), qbar(contiguous(central_query)),
      R(contiguous(score_sum));
  const Numbers T(floor ? contiguous(floor->absolute_sum) : Tensor()),
      mean(floor ? contiguous(floor->value_mean) : Tensor()), count(floor ? contiguous(floor->key_count) : Tensor());
  // score_floor T, and R + score_floor T + eps
  const auto share = [&](int64_t head) { return floor ? floor->score_floor * T[head] : 0; };
  const auto norm = [&](int64_t head) { return R[head] + share(head) + eps; };
  const Numbers query = plan.numbers(score_query), of_v = plan.numbers(dcontext);
  const auto run = [&](int64_t begin, int64_t end) {
    set_score_query(plan, qbar, units, query, begin * plan.heads, end * plan.heads);
    for (int64_t head = begin * plan.heads; head < end * plan.heads; ++head) {
      const HeadUnits u = units[head];
      double dot = 0, towards_mean = 0;
      Largest of_dz, of_z;
      for (int64_t c = 0; c < plan.d_v; ++c) {
        const int64_t at = head * s.d_v + c;
        if (c < s.d_v) dot += dz[at] * z[at], of_dz.of(dz[at]), of_z.of(z[at]);
        if (c < s.d_v && floor) towards_mean += dz[at] * (mean[at] - z[at]);
        of_v.set(head * plan.d_v + c, c < s.d_v ? dz[at] * u.dout : 0);
      }
      plan.numbers(dcontext_dot).set(head, dot * u.dout * u.v);
      const double per_score = 1 / norm(head) / u.q / u.k * u.score;
      plan.numbers(score_scale).set(head, per_score);
      // The scores' gradients may vanish though dk, which is theirs times qbar, does not.
      strange[head] = !plan.is_factor(R[head]) || !plan.is_sum(of_dz.size * of_z.size / norm(head));
      if (floor) {
        strange[head] |= !plan.is_factor(T[head]);
        plan.numbers(floor_weight).set(head, share(head) / norm(head) / count[head] * u.score);
        plan.numbers(floor_gradient).set(head, floor->score_floor * towards_mean * u.dout * u.v * per_score);
      }
    }
    const int64_t unit_bytes = s.M * plan.heads * plan.acc_bytes;
    keys.run(floor ? LinearPass::backward_keys_floor : LinearPass::backward_keys, args, begin, end, sums, plan.d,
             scores ? scores + begin * unit_bytes : nullptr);
    if (!want_dcentral) return;
    keys.for_heads(begin, end, sums, plan.d, [&](int64_t head, const auto& sums_of, const auto&) {
      const double* sum = sums_of(0);
      const HeadUnits u = units[head];
      strange[head] |= !plan.is_sum(plan.kernels.linear.largest(sum, s.d));
      double* of_head = dcentral.data_ptr<double>() + head * s.d;
      for (int64_t c = 0; c < s.d; ++c) of_head[c] = scale * sum[c] * u.q / u.dout / u.v / u.score;
    });
  };
  const auto set = [&](int64_t head) {
    HeadUnits u = units.measure(head);
    u.q = unit_of_numbers(qbar, head * s.d, s.d, plan.wide);
    u.dout = unit_of_numbers(dz, head * s.d_v, s.d_v, plan.wide);
    u.score = std::ldexp(1, std::ilogb(norm(head) * u.q * u.k));
    return units.install(head, u);
  };
  plan.for_waves(run);
  plan.for_strange(strange, set, run);
  const Tensor dscores_unit = want_dscores ? empty({s.B, s.H}, kDouble) : empty({0}, kDouble);
  for (int64_t head = 0; want_dscores && head < s.B * s.H; ++head) {
    const HeadUnits u = units[head];
    dscores_unit.data_ptr<double>()[head] = u.q * u.k / u.dout / u.v / u.score;
  }
  return {dk, dv, dcentral, dscores, dscores_unit};
}

Tensor linear_queries_bwd(const Tensor& dcentral_query, const OptTensor& dscores, const OptTensor& dscores_unit,
                          const Tensor& q, const Tensor& central_query, const Tensor& energy_sum, double eps,
                          const OptTensor& query_padding_mask) {
  Arguments a(kOp, "q", q, "BHNd");
  const Dtype acc = acc_dtype(q);
  a.tensor("dcentral_query", dcentral_query, kDouble, "BHd");
  a.tensor("dscores", dscores, acc, "BHN");
  a.tensor("dscores_unit", dscores_unit, kDouble, "BH");
  a.demand(dscores.has_value() == dscores_unit.has_value(), "dscores_unit");
  a.tensor("central_query", central_query, acc, "BHd");
  a.tensor("energy_sum", energy_sum, kDouble, "BH");
  a.demand(std::isfinite(eps) && eps > 0, "eps");
  a.tensor("query_padding_mask", query_padding_mask, kBool, "BN");
  const Sizes s = sizes_of_queries(a);
  const Tensor dq = new_gradient(true, q);

  const Plan plan(s, s.N, q, q, q);
  const Walk queries(plan, s.N, nullptr), keys(plan, 0, nullptr);
  const double scale = scale_of(s.d);
  const Buffer score_query(plan.head_bytes(plan.d)), query_vector(plan.head_bytes(plan.d)),
      query_dot(plan.head_bytes(1));
  LinearArgs args{};
  args.q = rows_of(q), args.dq = rows_of(dq), args.query_mask = mask_of(query_padding_mask);
  args.H = s.H, args.d = s.d, args.d_v = s.d_v;
  args.score_query = score_query.data(), args.query_vector = query_vector.data(), args.query_dot = query_dot.data();

  Units units(plan, queries, keys, args);
  std::vector<char> strange(s.B * s.H);
  const Numbers dqbar(contiguous(dcentral_query)), qbar(contiguous(central_query)), E(contiguous(energy_sum));
  const Numbers query = plan.numbers(score_query), f = plan.numbers(query_vector);
  // In the order in which the passes go over tokens and heads.
  const Tensor scores = !dscores ? Tensor()
                        : plan.heads > 1
                            ? contiguous(as_strided(*dscores, {s.B, s.N, s.H},
                                                    {dscores->stride(0), dscores->stride(2), dscores->stride(1)}))
                            : contiguous(*dscores);
  const Tensor scores_unit = dscores ? contiguous(*dscores_unit) : Tensor();
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t head = begin * plan.heads; head < end * plan.heads; ++head) {
      const HeadUnits u = units[head];
      const double per_score = dscores ? scale * scores_unit.data_ptr<double>()[head] * u.q * u.dout : 0;
      for (int64_t c = 0; c < plan.d; ++c) query.set(head * plan.d + c, c < s.d ? per_score * qbar[head * s.d + c] : 0);
      const double factor = scale * scale / (E[head] + eps) * u.dout;
      double dot = 0;
      Largest largest;
      for (int64_t c = 0; c < plan.d; ++c) {
        const double x = c < s.d ? factor * dqbar[head * s.d + c] : 0;
        largest.of(x);
        f.set(head * plan.d + c, x);
        if (c < s.d) dot += x * qbar[head * s.d + c] * u.q;
      }
      plan.numbers(query_dot).set(head, dot / scale);
      strange[head] = !plan.is_factor(E[head]) || !plan.is_sum(largest.size);
    }
    const int64_t unit_bytes = s.N * plan.heads * plan.acc_bytes;
    queries.run(LinearPass::backward_queries, args, begin, end, nullptr, 0,
                dscores ? static_cast<char*>(scores.data_ptr()) + begin * unit_bytes : nullptr);
  };
  const auto set = [&](int64_t head) {
    HeadUnits u = units.measure(head);
    double most = 0;
    for (int64_t c = 0; c < s.d; ++c) most = std::max(most, std::abs(dqbar[head * s.d + c]));
    u.dout = unit_of(scale * scale / (E[head] + eps) * most, plan.wide);
    // Gradients come out times u.q u.dout.
    u.score = u.q * u.q;
    return units.install(head, u);
  };
  plan.for_waves(run);
  plan.for_strange(strange, set, run);
  return dq;
}

}  // namespace

INFSA_LIBRARY_IMPL(CPU, m) {
  m.impl("linear_steps_queries_fwd", kernel<linear_queries_fwd>);
  m.impl("linear_steps_keys_fwd", kernel<linear_keys_fwd<false>>);
  m.impl("linear_steps_keys_floor_fwd", kernel<linear_keys_fwd<true>>);
  m.impl("linear_steps_keys_bwd", kernel([](const Tensor& dcontext, const Tensor& k, const Tensor& v,
                                            const Tensor& context, const Tensor& central_query, const Tensor& score_sum,
                                            double eps, const OptTensor& key_mask, std::array<bool, 4> output_mask) {
           return keys_bwd(dcontext, k, v, context, central_query, score_sum, {}, eps, key_mask, output_mask);
         }));
  m.impl("linear_steps_keys_floor_bwd",
         kernel([](const Tensor& dcontext, const Tensor& k, const Tensor& v, const Tensor& context,
                   const Tensor& central_query, const Tensor& score_sum, const Tensor& absolute_sum,
                   const Tensor& value_mean, const Tensor& key_count, double eps, double score_floor,
                   const OptTensor& key_mask, std::array<bool, 4> output_mask) {
           const Floor floor{absolute_sum, value_mean, key_count, score_floor};
           return keys_bwd(dcontext, k, v, context, central_query, score_sum, floor, eps, key_mask, output_mask);
         }));
  m.impl("linear_steps_queries_bwd", kernel<linear_queries_bwd>);
}

}  // namespace infsa::cpu::linear
