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
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "isa.h"
#include "memory.h"
#include "range.h"

namespace infsa::cpu {
namespace {

constexpr const char* kOp = "infsa::linear";
// Elements that are worth handing to another thread.
constexpr int64_t kGrain = 1 << 15;
// More would make adding the partial sums show, fewer would leave threads idle.
constexpr int64_t kMaxChunks = 128;
// Bytes of q that one wave of heads may have, so that its second pass finds them in the last-level cache.
constexpr int64_t kWaveBytes = 8 << 20;

Tensor new_cpu(at::IntArrayRef size, at::ScalarType dtype) { return at::detail::empty_cpu(size, dtype); }

// How the work of one call is cut. A unit is what one kernel call may span: a head, or all heads of a batch where the
// heads of a token lie side by side ("token-major", a (B, N, H, d) tensor).
struct Plan {
  const Kernels& kernels;
  const Sizes s;
  const bool wide;  // the accumulation type is double
  const int64_t acc_bytes, element_bytes, heads, units;
  const int64_t d, d_v;  // in whole vectors
  int64_t wave;

  Plan(const Sizes& s, const Tensor& q, const Tensor& k, const Tensor& v)
      : kernels(kernels_for(q.scalar_type())),
        s(s),
        wide(acc_dtype(q) == at::kDouble),
        acc_bytes(wide ? 8 : 4),
        element_bytes(q.element_size()),
        heads(s.H > 1 && token_major(q) && token_major(k) && token_major(v) ? s.H : 1),
        units(s.B * s.H / heads),
        d(round_up(s.d, kernels.lanes)),
        d_v(round_up(s.d_v, kernels.lanes)) {
    const int64_t unit_bytes = s.N * s.d * heads * element_bytes;
    wave = std::clamp<int64_t>(kWaveBytes / std::max<int64_t>(unit_bytes, 1), 1, std::max<int64_t>(units, 1));
  }

  int64_t chunk(int64_t tokens) const {
    const int64_t least = ceil_div(kGrain, heads * std::max<int64_t>(d + d_v, 1));
    return round_up(std::max(ceil_div(tokens, kMaxChunks), least), 16);
  }
  int64_t chunks(int64_t tokens) const { return ceil_div(tokens, chunk(tokens)); }
  int64_t sums_size(int64_t width) const { return heads * (width + 1); }
  // Bytes of the sums of a wave.
  int64_t sums_bytes(int64_t tokens, int64_t width) const {
    return wave * std::max<int64_t>(chunks(tokens), 1) * sums_size(width) * sizeof(double);
  }
  // Bytes of a vector or a scalar per head.
  int64_t head_bytes(int64_t width) const { return s.B * s.H * width * acc_bytes; }
  Numbers numbers(const Buffer& buffer) const { return {buffer, wide}; }

  // One pass over the tokens of units [begin, end). sums, where given, is (units, chunks, sums_size(width)).
  void run(LinearPass pass, const LinearArgs& args, int64_t begin, int64_t end, int64_t tokens, double* sums,
           int64_t width, char* dscores) const {
    const int64_t size = chunk(tokens), count = chunks(tokens);
    const int64_t grain = std::max<int64_t>(1, kGrain / (std::min(size, tokens + 1) * heads * (d + d_v + 1)));
    at::parallel_for(0, (end - begin) * count, grain, [&](int64_t first, int64_t last) {
      const Buffer scratch(kernels.linear.scratch_bytes(heads, s.d, s.d_v));
      for (int64_t i = first; i < last; ++i) {
        const int64_t head = (begin + i / count) * heads, from = i % count * size;
        double* chunk_sums = sums ? sums + i * sums_size(width) : nullptr;
        if (sums) std::memset(chunk_sums, 0, sums_size(width) * sizeof(double));
        kernels.linear.run(pass, args,
                           {head / s.H, head % s.H, heads, from, std::min(from + size, tokens), chunk_sums,
                            dscores ? dscores + i / count * tokens * heads * acc_bytes : nullptr, scratch.data()});
      }
    });
  }

  // Adds the chunks' sums up and calls body(head, vector sum, weight sum) for every head of the units.
  template <typename Body>
  void for_heads(int64_t begin, int64_t end, int64_t tokens, double* sums, int64_t width, const Body& body) const {
    const int64_t count = chunks(tokens), size = sums_size(width);
    at::parallel_for(begin, end, std::max<int64_t>(1, kGrain / ((count + 1) * size)), [&](int64_t first, int64_t last) {
      for (int64_t unit = first; unit < last; ++unit) {
        double* total = sums + (unit - begin) * std::max<int64_t>(count, 1) * size;
        if (count == 0) std::memset(total, 0, size * sizeof(double));
        for (int64_t c = 1; c < count; ++c) {
          for (int64_t i = 0; i < size; ++i) total[i] += total[c * size + i];
        }
        for (int64_t h = 0; h < heads; ++h) body(unit * heads + h, total + h * width, total[heads * width + h]);
      }
    });
  }

  // run(begin, end) over all units, a wave at a time.
  template <typename Run> void for_waves(const Run& run) const {
    for (int64_t begin = 0; begin < units; begin += wave) run(begin, std::min(begin + wave, units));
  }
  // The same for the units that have a strange head, once set(head) has found units of measure for one.
  template <typename Set, typename Run>
  void for_strange(const std::vector<char>& strange, const Set& set, const Run& run) const {
    std::vector<char> found(units);
    for (int64_t head = 0; head < s.B * s.H; ++head) {
      if (strange[head] && set(head)) found[head / heads] = true;
    }
    for (int64_t unit = 0; unit < units; ++unit) {
      if (found[unit]) run(unit, unit + 1);
    }
  }

  // Normalisers divide products of two rows; sums of products may be larger.
  bool is_factor(double x) const { return within(x, kMostFactor, wide); }
  template <typename X> bool is_sum(const X& x, int64_t begin, int64_t end) const {
    double most = 0;
    for (int64_t i = begin; i < end; ++i) {
      if (!(std::abs(x[i]) <= most)) most = std::abs(x[i]);
    }
    return within(most, kMostSum, wide);
  }

 private:
  static bool token_major(const Tensor& t) { return t.stride(1) < t.stride(2); }
};

// What the rows of a head are multiplied by as they are read, and score_scale with them.
struct HeadUnits {
  double q = 1, k = 1, v = 1, dout = 1, score = 1;
};

// The units of measure of a call's heads, once one needs them.
class Units {
 public:
  Units(const Plan& plan, LinearArgs& args) : plan_(plan), args_(args) {}

  HeadUnits operator[](int64_t head) const { return heads_.empty() ? HeadUnits{} : heads_[head]; }

  // Brings a head to order one: q, k and v, and with dout (B, H, d_v) that and norm = R + eps. False where that is no
  // help: one is not finite.
  bool set(int64_t head, const Tensor* dout = nullptr, double norm = 1) {
    const Sizes& s = plan_.s;
    HeadUnits u;
    u.q = unit(args_.q, head, s.N, s.d, args_.query_mask);
    u.k = unit(args_.k, head, s.M, s.d, args_.key_mask);
    u.v = unit(args_.v, head, s.M, s.d_v, args_.key_mask);
    if (args_.k.data == args_.q.data) u.q = u.k = std::min(u.q, u.k);
    if (dout) {
      u.dout = unit({dout->data_ptr(), s.H * s.d_v, s.d_v, 0, 1}, head, 1, s.d_v, {});
      u.score = std::ldexp(1, std::ilogb(norm * u.q * u.k));
    }
    if (u.q * u.k * u.v * u.dout == 0) return false;
    if (heads_.empty()) {
      heads_.resize(s.B * s.H);
      rows_ = at::ones({6, s.B * s.H + Buffer::kSlack}, plan_.wide ? at::kDouble : at::kFloat);
      const void** parts[] = {&args_.unit.q,  &args_.unit.k,  &args_.unit.v,
                              &args_.unit.dq, &args_.unit.dk, &args_.unit.dv};
      for (int i = 0; i < 6; ++i) *parts[i] = rows_.select(0, i).data_ptr();
    }
    heads_[head] = u;
    const double gradient = 1 / (u.dout * u.score);
    const double values[] = {u.q, u.k, u.v, u.q * gradient / u.v, u.k * gradient / u.v, gradient};
    for (int i = 0; i < 6; ++i) Numbers(rows_.select(0, i)).set(head, finite(values[i], plan_.wide));
    return true;
  }

 private:
  double unit(const Rows& rows, int64_t head, int64_t tokens, int64_t columns, const Mask& mask) const {
    const int64_t b = head / plan_.s.H;
    const Tokens of_head = tokens_of(rows, b, head % plan_.s.H, plan_.element_bytes);
    double most = 0;
    for (int64_t n = 0, end; n < tokens; n = end) {
      end = mask.data ? n + 1 : tokens;
      if (mask.data && mask.data[b * mask.batch + n * mask.token]) continue;
      const double x = plan_.kernels.tokens.largest(of_head, columns, {n, end});
      if (!std::isfinite(x)) return 0;
      most = std::max(most, x);
    }
    return unit_of(most, plan_.wide);
  }

  const Plan& plan_;
  LinearArgs& args_;
  std::vector<HeadUnits> heads_;
  Tensor rows_;
};

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
