// Linear-InfSA on the CPU.
//
//   E = sum_i ||u_i||,  qbar = sum_i ||u_i|| u_i / (E + eps),  r_j = ReLU(qbar . kappa_j),  R = sum_j r_j,
//   context = sum_j r_j v_j / (R + eps),  out = rho head_rho context           u = s q, kappa = s k, s = 1 / sqrt(d)
//
// q (B,H,N,d), k (B,H,M,d), v (B,H,M,dv); out, context (B,H,dv), central_query = qbar (B,H,d), energy_sum = E and
// score_sum = R (B,H). Saved for the backward: those four statistics, and the inputs.
//
// Forward and backward are two passes over the tokens each (linear_kernels.h), in chunks over all threads. Chunks
// depend on the shape alone and their partial sums are added in their order, in double: the same bits for any number of
// threads.
//
// A head whose numbers left the range of the accumulation type on the way is run once more, in units that bring it to
// order one: q, k, v and dout times powers of two, which change no digit. Nobody else pays for it.
#include "linear.h"

#include <ATen/Dispatch.h>
#include <ATen/EmptyTensor.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "../check.h"
#include "alloc.h"

namespace infsa::cpu {
namespace {

// Elements that are worth handing to another thread.
constexpr int64_t kGrain = 1 << 15;
// More would make adding the partial sums show, fewer would leave threads idle.
constexpr int64_t kMaxChunks = 128;
// Bytes of q that one wave of heads may have, so that its second pass finds them in the last-level cache.
constexpr int64_t kWaveBytes = 8 << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const LinearKernels& kernels_of(at::ScalarType dtype) {
  const int column = dtype == at::kFloat ? 0 : dtype == at::kBFloat16 ? 1 : dtype == at::kHalf ? 2 : 3;
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::avx512:
      return avx512::linear_kernels[column];
    case Isa::avx2:
      return avx2::linear_kernels[column];
#endif
    default:
      return portable::linear_kernels[column];
  }
}

LinearRows rows_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

LinearMask mask_of(const OptTensor& t) {
  return t ? LinearMask{t->const_data_ptr<bool>(), t->stride(0), t->stride(1)} : LinearMask{};
}

Tensor new_cpu(at::IntArrayRef size, at::ScalarType dtype) { return at::detail::empty_cpu(size, dtype); }

// Working memory, aligned to cache lines.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : data_(c10::alloc_cpu(bytes)) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { c10::free_cpu(data_); }
  template <typename T> T* as() const { return static_cast<T*>(data_); }

 private:
  void* data_;
};

// How the work of one call is cut. A unit is what one kernel call may span: a head, or all heads of a batch where the
// heads of a token lie side by side ("token-major", a (B, N, H, d) tensor).
struct Plan {
  const LinearKernels& kernels;
  Sizes s;
  int64_t heads, units, wave, d, dv, acc_bytes;

  Plan(const Sizes& s, const Tensor& q, const Tensor& k, const Tensor& v) : kernels(kernels_of(q.scalar_type())), s(s) {
    const auto token_major = [](const Tensor& t) { return t.stride(1) < t.stride(2); };
    heads = s.H > 1 && token_major(q) && token_major(k) && token_major(v) ? s.H : 1;
    units = s.B * s.H / heads;
    acc_bytes = acc_dtype(q) == at::kDouble ? 8 : 4;
    const int64_t lanes = kernels.vector_bytes / acc_bytes;
    d = ceil_div(s.d, lanes) * lanes;
    dv = ceil_div(s.dv, lanes) * lanes;
    const int64_t unit_bytes = s.N * s.d * heads * q.element_size();
    wave = std::clamp<int64_t>(kWaveBytes / std::max<int64_t>(unit_bytes, 1), 1, std::max<int64_t>(units, 1));
  }

  int64_t chunk(int64_t tokens) const {
    const int64_t least = ceil_div(kGrain, heads * std::max<int64_t>(d + dv, 1));
    return ceil_div(std::max(ceil_div(tokens, kMaxChunks), least), 16) * 16;
  }
  int64_t chunks(int64_t tokens) const { return ceil_div(tokens, chunk(tokens)); }
  int64_t sums_size(int64_t width) const { return heads * (width + 1); }

  // A buffer for vectors or scalars per head; the kernels read whole vectors.
  int64_t head_bytes(int64_t width) const { return s.B * s.H * width * acc_bytes + kLinearSlack; }

  // One pass over the tokens of units [begin, end). sums, where given, is (units, chunks, sums_size(width)).
  void run(LinearKernels::Kernel kernel, const LinearArgs& args, int64_t begin, int64_t end, int64_t tokens,
           double* sums, int64_t width, char* dscores) const {
    const int64_t size = chunk(tokens), count = chunks(tokens);
    const int64_t grain = std::max<int64_t>(1, kGrain / (std::min(size, tokens + 1) * heads * (d + dv + 1)));
    at::parallel_for(0, (end - begin) * count, grain, [&](int64_t first, int64_t last) {
      const Buffer scratch(kernels.scratch_bytes(heads, s.d, s.dv, acc_bytes));
      for (int64_t i = first; i < last; ++i) {
        const int64_t head = (begin + i / count) * heads, from = i % count * size;
        double* chunk_sums = sums ? sums + i * sums_size(width) : nullptr;
        if (sums) std::memset(chunk_sums, 0, sums_size(width) * sizeof(double));
        kernel(args, {head / s.H, head % s.H, heads, from, std::min(from + size, tokens), chunk_sums,
                      dscores ? dscores + i / count * tokens * heads * acc_bytes : nullptr, scratch.as<void>()});
      }
    });
  }

  // Runs the units again that have a strange head, once set(head) has found units for one.
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
};

double scale_of(const Sizes& s) { return s.d ? 1 / std::sqrt(static_cast<double>(s.d)) : 1; }

double rho_of(double rho, const OptTensor& head_rho, const Sizes& s, int64_t head) {
  if (!head_rho) return rho;
  const int64_t at = head / s.H * head_rho->stride(0) + head % s.H * head_rho->stride(1);
  return rho * (head_rho->scalar_type() == at::kDouble ? head_rho->const_data_ptr<double>()[at]
                                                       : head_rho->const_data_ptr<float>()[at]);
}

// Whether |x| is 0 or within 2^-most .. 2^most, for double six times as far.
template <typename A> bool within(double x, int most) {
  return x == 0 || (std::isfinite(x) && std::abs(std::ilogb(x)) <= (sizeof(A) == 8 ? 6 * most : most));
}

// The normalisers E and R divide products of two rows, which keep their digits while these are not extreme; sums of
// products may go further.
constexpr int kMostNormaliser = 50;
constexpr int kMostSum = 100;

template <typename A, typename X> bool sums_within(const X* x, int64_t n) {
  double most = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!(std::abs(x[i]) <= most)) most = std::abs(x[i]);
  }
  return within<A>(most, kMostSum);
}

// What the rows of a head are multiplied by as they are read, and score_scale with them.
struct HeadUnits {
  double q = 1, k = 1, v = 1, dout = 1, score = 1;
};

// The units of a call's heads, once one needs them.
template <typename T> class Units {
 public:
  using A = at::opmath_type<T>;

  Units(LinearArgs& args, const Sizes& s) : args_(args), s_(s) {}

  HeadUnits operator[](int64_t head) const { return heads_.empty() ? HeadUnits{} : heads_[head]; }

  // Brings a head to order one: q, k and v, and with dout (B, H, dv) that and norm = R + eps. False where that is no
  // help: one is not finite.
  bool set(int64_t head, const T* dout = nullptr, double norm = 1) {
    const int64_t b = head / s_.H, h = head % s_.H;
    HeadUnits u;
    u.q = unit(args_.q, b, h, s_.N, s_.d, args_.query_mask);
    u.k = unit(args_.k, b, h, s_.M, s_.d, args_.key_mask);
    u.v = unit(args_.v, b, h, s_.M, s_.dv, args_.key_mask);
    if (args_.k.data == args_.q.data) u.q = u.k = std::min(u.q, u.k);
    if (dout) {
      u.dout = unit({const_cast<T*>(dout) + head * s_.dv, 0, 0, 0, 1}, 0, 0, 1, s_.dv, {});
      u.score = std::ldexp(1, std::ilogb(norm * u.q * u.k));
    }
    if (u.q * u.k * u.v * u.dout == 0) return false;
    const int64_t all = s_.B * s_.H, stride = all + kLinearSlack / sizeof(A);
    if (heads_.empty()) {
      heads_.resize(all);
      rows_.assign(6 * stride, A(1));
      const void** parts[] = {&args_.unit.q,  &args_.unit.k,  &args_.unit.v,
                              &args_.unit.dq, &args_.unit.dk, &args_.unit.dv};
      for (int i = 0; i < 6; ++i) *parts[i] = rows_.data() + i * stride;
    }
    heads_[head] = u;
    const double gradient = 1 / (u.dout * u.score);
    const double values[] = {u.q, u.k, u.v, u.q * gradient / u.v, u.k * gradient / u.v, gradient};
    // One that overflows would turn a sum of 0 into NaN.
    constexpr double most = std::numeric_limits<A>::max();
    for (int i = 0; i < 6; ++i) rows_[i * stride + head] = static_cast<A>(std::min(values[i], most));
    return true;
  }

 private:
  static double unit(const LinearRows& rows, int64_t b, int64_t h, int64_t tokens, int64_t columns,
                     const LinearMask& mask) {
    constexpr int limit = sizeof(A) == 8 ? 1000 : 120;
    double most = 0;
    for (int64_t n = 0; n < tokens; ++n) {
      if (mask.data && mask.data[b * mask.batch + n * mask.token]) continue;
      const T* row = static_cast<const T*>(rows.data) + b * rows.batch + h * rows.head + n * rows.token;
      for (int64_t c = 0; c < columns; ++c) {
        const double x = std::abs(static_cast<double>(static_cast<A>(row[c * rows.channel])));
        if (!std::isfinite(x)) return 0;
        most = std::max(most, x);
      }
    }
    return most == 0 ? 1 : std::ldexp(1, std::clamp(-std::ilogb(most), -limit, limit));
  }

  LinearArgs& args_;
  const Sizes& s_;
  std::vector<HeadUnits> heads_;
  std::vector<A> rows_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_fwd(const Tensor& q, const OptTensor& k_, const Tensor& v,
                                                              double eps, double rho, const OptTensor& head_rho,
                                                              const OptTensor& key_padding_mask,
                                                              const OptTensor& query_padding_mask) {
  const Sizes s =
      check::forward_arguments("infsa::linear", q, k_, v, eps, rho, head_rho, key_padding_mask, query_padding_mask);
  const Tensor& k = k_ ? *k_ : q;
  const auto acc = acc_dtype(q);
  Tensor out = new_cpu({s.B, s.H, s.dv}, q.scalar_type()), context = new_cpu({s.B, s.H, s.dv}, acc);
  Tensor central_query = new_cpu({s.B, s.H, s.d}, acc), energy_sum = new_cpu({s.B, s.H}, acc),
         score_sum = new_cpu({s.B, s.H}, acc);

  const Plan plan(s, q, k, v);
  const double scale = scale_of(s);
  const Buffer score_query(plan.head_bytes(plan.d));
  const int64_t sums_size = std::max(std::max<int64_t>(plan.chunks(s.N), 1) * plan.sums_size(plan.d),
                                     std::max<int64_t>(plan.chunks(s.M), 1) * plan.sums_size(plan.dv));
  const Buffer sums_buffer(plan.wave * sums_size * sizeof(double));
  double* sums = sums_buffer.as<double>();

  LinearArgs args{};
  args.q = rows_of(q), args.k = rows_of(k), args.v = rows_of(v);
  args.query_mask = mask_of(query_padding_mask), args.key_mask = mask_of(key_padding_mask);
  args.H = s.H, args.d = s.d, args.dv_size = s.dv;
  args.score_query = score_query.as<void>();

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "linear_fwd", [&] {
    using A = at::opmath_type<scalar_t>;
    Units<scalar_t> units(args, s);
    std::vector<char> strange(s.B * s.H);
    const auto run = [&](int64_t begin, int64_t end) {
      plan.run(plan.kernels.fwd_queries, args, begin, end, s.N, sums, plan.d, nullptr);
      plan.for_heads(begin, end, s.N, sums, plan.d, [&](int64_t head, const double* sum, double norm_sum) {
        const HeadUnits u = units[head];
        A* qbar = central_query.mutable_data_ptr<A>() + head * s.d;
        A* query = score_query.as<A>() + head * plan.d;
        const double energy = scale * norm_sum;
        strange[head] = !within<A>(energy, kMostNormaliser) || !sums_within<A>(sum, s.d);
        energy_sum.mutable_data_ptr<A>()[head] = static_cast<A>(energy / u.q);
        std::fill(query + s.d, query + plan.d, A(0));
        for (int64_t c = 0; c < s.d; ++c) {
          qbar[c] = static_cast<A>(scale * scale * sum[c] / (energy + eps * u.q) / u.q);
          // From qbar as it is saved, as in the backward: scores have the same bits there, and their rounding cancels
          // in r_j / R where few keys share the weight.
          query[c] = static_cast<A>(scale * qbar[c] * u.q);
        }
      });
      plan.run(plan.kernels.fwd_keys, args, begin, end, s.M, sums, plan.dv, nullptr);
      plan.for_heads(begin, end, s.M, sums, plan.dv, [&](int64_t head, const double* sum, double scores) {
        const HeadUnits u = units[head];
        const double head_scale = rho_of(rho, head_rho, s, head);
        strange[head] |= !within<A>(scores, kMostNormaliser) || !sums_within<A>(sum, s.dv);
        score_sum.mutable_data_ptr<A>()[head] = static_cast<A>(scores / u.q / u.k);
        for (int64_t c = 0; c < s.dv; ++c) {
          const double x = sum[c] / (scores + eps * u.q * u.k) / u.v;
          context.mutable_data_ptr<A>()[head * s.dv + c] = static_cast<A>(x);
          out.mutable_data_ptr<scalar_t>()[head * s.dv + c] = static_cast<scalar_t>(static_cast<A>(head_scale * x));
        }
      });
    };
    for (int64_t begin = 0; begin < plan.units; begin += plan.wave) {
      run(begin, std::min(begin + plan.wave, plan.units));
    }
    plan.for_strange(strange, [&](int64_t head) { return units.set(head); }, run);
  });
  return {out, context, central_query, energy_sum, score_sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_bwd(const Tensor& dout_, const Tensor& q, const OptTensor& k_,
                                                      const Tensor& v, const Tensor& context_,
                                                      const Tensor& central_query_, const Tensor& energy_sum_,
                                                      const Tensor& score_sum_, double eps, double rho,
                                                      const OptTensor& head_rho, const OptTensor& key_padding_mask,
                                                      const OptTensor& query_padding_mask,
                                                      std::array<bool, 4> output_mask) {
  constexpr const char* op = "infsa::linear";
  const Sizes s = check::forward_arguments(op, q, k_, v, eps, rho, head_rho, key_padding_mask, query_padding_mask);
  check::dtype(op, "dout", dout_, q.scalar_type());
  check::device(op, "dout", dout_, q);
  check::shape(op, "dout", dout_, {s.B, s.H, s.dv}, "(B, H, dv)");
  check::statistic(op, "context", context_, q, {s.B, s.H, s.dv}, "(B, H, dv)");
  check::statistic(op, "central_query", central_query_, q, {s.B, s.H, s.d}, "(B, H, d)");
  check::statistic(op, "energy_sum", energy_sum_, q, {s.B, s.H}, "(B, H)");
  check::statistic(op, "score_sum", score_sum_, q, {s.B, s.H}, "(B, H)");
  const Tensor dout = dout_.contiguous(), context = context_.contiguous(), central_query = central_query_.contiguous();
  const Tensor energy_sum = energy_sum_.contiguous(), score_sum = score_sum_.contiguous();
  const bool tied = !k_;
  const Tensor& k = tied ? q : *k_;
  const auto [want_dq, want_dk_any, want_dv, want_drho_any] = output_mask;
  const bool want_dk = want_dk_any && !tied, want_drho = want_drho_any && head_rho;
  const auto gradient = [&](bool want, const Tensor& t) {
    return want ? with_huge_pages(at::empty_like(t)) : new_cpu({0}, t.scalar_type());
  };
  Tensor dq = gradient(want_dq, q), dk = gradient(want_dk, k), dv = gradient(want_dv, v);
  Tensor dhead_rho = want_drho ? new_cpu({s.B, s.H}, acc_dtype(q)) : new_cpu({0}, acc_dtype(q));

  const Plan plan(s, q, k, v);
  const double scale = scale_of(s);
  const Buffer score_query(plan.head_bytes(plan.d)), query_vector(plan.head_bytes(plan.d)),
      dcontext(plan.head_bytes(plan.dv));
  const Buffer dcontext_dot(plan.head_bytes(1)), score_scale(plan.head_bytes(1)), query_dot(plan.head_bytes(1));
  const Buffer sums_buffer(
      want_dq ? plan.wave * std::max<int64_t>(plan.chunks(s.M), 1) * plan.sums_size(plan.d) * sizeof(double) : 0);
  const Tensor dscores_buffer =
      with_huge_pages(new_cpu({tied && want_dq ? plan.wave * s.N * plan.heads * plan.acc_bytes : 0}, at::kByte));
  double* sums = want_dq ? sums_buffer.as<double>() : nullptr;
  char* dscores = tied && want_dq ? static_cast<char*>(dscores_buffer.data_ptr()) : nullptr;

  LinearArgs args{};
  args.q = rows_of(q), args.k = rows_of(k), args.v = rows_of(v);
  if (want_dq) args.dq = rows_of(dq);
  if (want_dk) args.dk = rows_of(dk);
  if (want_dv) args.dv = rows_of(dv);
  args.query_mask = mask_of(query_padding_mask), args.key_mask = mask_of(key_padding_mask);
  args.H = s.H, args.d = s.d, args.dv_size = s.dv;
  args.score_query = score_query.as<void>(), args.query_vector = query_vector.as<void>(),
  args.dcontext = dcontext.as<void>();
  args.dcontext_dot = dcontext_dot.as<void>(), args.score_scale = score_scale.as<void>(),
  args.query_dot = query_dot.as<void>();

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "linear_bwd", [&] {
    using A = at::opmath_type<scalar_t>;
    Units<scalar_t> units(args, s);
    std::vector<char> strange(s.B * s.H);
    const A* qbar = central_query.const_data_ptr<A>();
    const auto prepare = [&](int64_t first, int64_t last) {
      for (int64_t head = first; head < last; ++head) {
        const HeadUnits u = units[head];
        const scalar_t* dz = dout.const_data_ptr<scalar_t>() + head * s.dv;
        const A* z = context.const_data_ptr<A>() + head * s.dv;
        A* query = score_query.as<A>() + head * plan.d;
        A* rho_dz = dcontext.as<A>() + head * plan.dv;
        const double head_scale = rho_of(rho, head_rho, s, head);
        double dot = 0;
        for (int64_t c = 0; c < s.dv; ++c) {
          dot += static_cast<double>(static_cast<A>(dz[c])) * z[c];
          rho_dz[c] = static_cast<A>(head_scale * static_cast<A>(dz[c]) * u.dout);
        }
        for (int64_t c = 0; c < s.d; ++c) query[c] = static_cast<A>(scale * qbar[head * s.d + c] * u.q);
        std::fill(rho_dz + s.dv, rho_dz + plan.dv, A(0));
        std::fill(query + s.d, query + plan.d, A(0));
        const double E = energy_sum.const_data_ptr<A>()[head], R = score_sum.const_data_ptr<A>()[head];
        strange[head] = !within<A>(E, kMostNormaliser) || !within<A>(R, kMostNormaliser);
        dcontext_dot.as<A>()[head] = static_cast<A>(head_scale * dot * u.dout * u.v);
        score_scale.as<A>()[head] = static_cast<A>(1 / (R + eps) / u.q / u.k * u.score);
        if (want_drho) dhead_rho.mutable_data_ptr<A>()[head] = static_cast<A>(rho * dot);
      }
    };
    const auto run = [&](int64_t begin, int64_t end) {
      plan.run(plan.kernels.bwd_keys, args, begin, end, s.M, sums, plan.d, dscores);
      if (!want_dq) return;
      plan.for_heads(begin, end, s.M, sums, plan.d, [&](int64_t head, const double* sum, double) {
        const HeadUnits u = units[head];
        A* f = query_vector.as<A>() + head * plan.d;
        const double factor = scale * scale * scale / ((energy_sum.const_data_ptr<A>()[head] + eps) * u.q);
        double dot = 0;
        for (int64_t c = 0; c < s.d; ++c) {
          f[c] = static_cast<A>(factor * sum[c]);
          dot += factor * sum[c] * qbar[head * s.d + c] * u.q;
        }
        strange[head] |= !sums_within<A>(f, s.d);
        std::fill(f + s.d, f + plan.d, A(0));
        query_dot.as<A>()[head] = static_cast<A>(dot / scale);
      });
      plan.run(plan.kernels.bwd_queries, args, begin, end, s.N, nullptr, 0, dscores);
    };
    at::parallel_for(0, s.B * s.H, kGrain / (s.d + s.dv + 1) + 1, prepare);
    if (!(want_dq || want_dk || want_dv)) return;
    for (int64_t begin = 0; begin < plan.units; begin += plan.wave) {
      run(begin, std::min(begin + plan.wave, plan.units));
    }
    plan.for_strange(
        strange,
        [&](int64_t head) {
          const double norm = score_sum.const_data_ptr<A>()[head] + eps;
          return units.set(head, dout.const_data_ptr<scalar_t>(), norm);
        },
        [&](int64_t begin, int64_t end) {
          prepare(begin * plan.heads, end * plan.heads);
          run(begin, end);
        });
  });
  return {dq, dk, dv, dhead_rho};
}

}  // namespace

TORCH_LIBRARY_IMPL(infsa, CPU, m) {
  m.impl("linear_fwd", linear_fwd);
  m.impl("linear_bwd", linear_bwd);
}

}  // namespace infsa::cpu
