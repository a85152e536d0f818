// The CPU backend of infsa::pure_fwd and infsa::pure_bwd: checks, memory, and what each cell of the score matrix adds
// to (pure_plan.h cuts it). The equations are in docs/pure.md, the arithmetic in pure_kernels.h.
//
// Cells that share no chunk run in parallel, and each adds to sums that no other then touches. A head whose numbers
// left the range of the accumulation type is run once more (range.h). infsa::pure_varlen is the same on batches whose
// tokens are runs of packed ones (packed.h).
#include <array>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "packed.h"
#include "pure_plan.h"

namespace infsa::cpu::pure {
namespace {

constexpr const char *kOp = "infsa::pure", *kPackedOp = "infsa::pure_varlen";

bool same_mask(const OptTensor& a, const OptTensor& b) {
  if (!a || !b) return !a && !b;
  return a->data_ptr() == b->data_ptr() && a->strides().equals(b->strides());  // no == in torch 2.10
}

void clear(void* sums, Range rows, int64_t row_bytes) {
  if (sums) std::memset(static_cast<char*>(sums) + rows.begin * row_bytes, 0, rows.size() * row_bytes);
}

// Writes the rows of out that count, rounded to its dtype, and the norms.
void forward(Call& call, double eps, const Tensor& out, const Tensor& norm) {
  const auto [B, H, N, M, d, d_v] = call.size;
  const Numbers F_of(norm);
  const int64_t stride = d_v <= kFewColumns ? d_v : round_up(d_v, call.kernels.lanes);
  const int64_t row_bytes = stride * norm.element_size(), head_bytes = round_up(N * row_bytes, 64);
  const Cut cells = cut(call, head_bytes, kForwardCells, !call.symmetric);
  const int64_t n = cells.n, squares_per_head = n * cells.rounds;
  std::vector<double> squares(call.heads() * squares_per_head);  // of P, by cell
  std::vector<double> largest(call.heads() * n);                 // of P v, by chunk
  const auto square_sum = [&](int64_t head) { return sum(&squares[head * squares_per_head], squares_per_head); };

  const auto run = [&](Range heads) {
    run_heads(
        call, heads, cells, head_bytes, false,
        [&](int64_t head, int64_t i, char* sums) {
          clear(sums, chunk(call.queries.count(head / call.size.H), n, i), row_bytes);
        },
        [&](int64_t head, const Cell& c, char* sums, char* scratch) {
          const PureHead h = call.head(head);
          const Range queries = c.queries(h.N, n), keys = call.symmetric ? c.keys(h.M, n) : Range{0, h.M};
          squares[head * squares_per_head + c.round * n + c.i] =
              call.kernels.pure.forward(h, {sums, nullptr, nullptr, nullptr}, keys, queries, c.i != c.j, scratch);
        },
        [&](int64_t head, int64_t i, char* sums) {
          const PureHead h = call.head(head);
          const Range queries = chunk(h.N, n, i);
          const PureUnits& u = h.unit;
          const double F = std::sqrt(square_sum(head));
          kernels_for(out.dtype())
              .tokens.store(call.tokens(out, head, call.queries), sums, stride, d_v,
                            finite(h.rho / (F + eps * u.q * u.k) / u.v, call.wide), queries);
          largest[head * n + i] = call.kernels.tokens.largest_sum(sums, stride, queries);
          if (i == 0) F_of.set(head, F / u.q / u.k);
        });
  };
  run({0, call.heads()});
  for (int64_t head = 0; head < call.heads(); ++head) {
    const double F = std::sqrt(square_sum(head)), most = sum(&largest[head * n], n);
    // F is 0 where no score is positive, and where the squares were too small: then P v is not 0, or eps is as small. P
    // v is 0 where v is, and where their products were too small.
    const bool lost = F == 0 ? most != 0 || !call.is_factor(eps) : most == 0 && call.has_values(head);
    const bool ordinary = !lost && call.is_factor(F) && call.is_sum(most);
    if (!ordinary && call.scale_head(head)) run({head, head + 1});
  }
}

// Those of q, k, v and head_rho; of no elements where they are not wanted.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Writes the rows of the gradients that count, rounded to their dtypes. dout_dot(head, tokens of a chunk of queries):
// their <dout, out>.
template <typename Dot> void backward(Call& call, double eps, const Tensor& dout, const Dot& dout_dot,
                                      const Tensor& norm, const Gradients& gradients) {
  const auto [B, H, N, M, d, d_v] = call.size;
  const double rho = call.rho;
  const auto& [grad_q, grad_k, grad_v, grad_rho] = gradients;
  const bool want_q = grad_q.dim() > 1, want_k = grad_k.dim() > 1, want_v = grad_v.dim() > 1,
             want_rho = grad_rho.dim() > 1;
  if (!(want_q || want_k || want_v || want_rho)) return;
  const auto store = [&](const Tensor& to, int64_t head, const Kept& kept, const void* sums, int64_t stride,
                         double scale, Range tokens) {
    kernels_for(to.dtype())
        .tokens.store(call.tokens(to, head, kept), sums, stride, to.size(3), finite(scale, call.wide), tokens);
  };
  const Numbers F_of(contiguous(norm)), drho(grad_rho);
  const int64_t stride = round_up(d, call.kernels.lanes), v_stride = round_up(d_v, call.kernels.lanes);
  const int64_t row_bytes = stride * norm.element_size(), v_row_bytes = v_stride * norm.element_size();
  const int64_t q_bytes = want_q ? N * row_bytes : 0;
  const int64_t k_bytes = want_k ? M * row_bytes : 0;
  const int64_t v_bytes = want_v || want_rho ? M * v_row_bytes : 0;
  const auto parts = [=](char* sums) {
    char* dq = q_bytes ? sums : nullptr;
    char* dk = k_bytes ? sums + q_bytes : nullptr;
    return PureSums{nullptr, dq, dk, v_bytes ? sums + q_bytes + k_bytes : nullptr};
  };
  const Cut cells = cut(call, q_bytes + k_bytes + v_bytes, kBackwardCells, false);
  const int64_t n = cells.n;
  std::vector<double> dots(call.heads() * n), v_dv(call.heads() * n);  // <dout, out> and <v, dv>, by chunk

  const auto head_of = [&](int64_t index) {
    PureHead h = call.head(index);
    const PureUnits& u = h.unit;
    const double F = F_of[index] * u.q * u.k;
    h.dout = call.tokens(dout, index, call.queries);
    h.eps = eps * u.q * u.k;
    h.inverse_norm = 1 / (F + h.eps);
    h.c = F == 0 ? 0 : sum(&dots[index * n], n) * u.dout * u.v / (F * (F + h.eps));
    return h;
  };
  const auto run = [&](Range heads) {
    run_heads(
        call, heads, cells, q_bytes + k_bytes + v_bytes, true,
        [&](int64_t head, int64_t i, char* memory) {
          const Range queries = chunk(call.queries.count(head / call.size.H), n, i);
          const Range keys = chunk(call.keys.count(head / call.size.H), n, i);
          const PureSums sums = parts(memory);
          clear(sums.dq, queries, row_bytes);
          clear(sums.dk, keys, row_bytes);
          clear(sums.dv, keys, v_row_bytes);
          dots[head * n + i] = dout_dot(head, queries);
        },
        [&](int64_t head, const Cell& c, char* memory, char* scratch) {
          const PureHead h = head_of(head);
          call.kernels.pure.backward(h, parts(memory), c.keys(h.M, n), c.queries(h.N, n), c.i != c.j || c.a != c.b,
                                     scratch);
        },
        [&](int64_t head, int64_t i, char* memory) {
          const PureHead h = call.head(head);
          const PureUnits& u = h.unit;
          const PureSums sums = parts(memory);
          const Range queries = chunk(h.N, n, i), keys = chunk(h.M, n, i);
          // dS came out times (u.dout u.v) / (u.q u.k).
          const double per_v = 1 / u.dout, per_score = per_v / u.v;
          if (want_q) store(grad_q, head, call.queries, sums.dq, stride, per_score * u.q, queries);
          if (want_k) store(grad_k, head, call.keys, sums.dk, stride, per_score * u.k, keys);
          if (want_v) store(grad_v, head, call.keys, sums.dv, v_stride, h.rho * per_v, keys);
          if (want_rho) v_dv[head * n + i] = per_v * call.kernels.tokens.dot(h.v, {}, sums.dv, v_stride, d_v, keys);
        });
  };
  run({0, call.heads()});
  for (int64_t head = 0; head < call.heads(); ++head) {
    const double F = F_of[head];
    if (!std::isfinite(F)) continue;  // what it was is lost
    const bool ordinary = call.is_factor(F) && call.is_factor(F + eps) && call.is_sum(head_of(head).c);
    if (!ordinary && call.scale_head(head, &dout, F + eps)) run({head, head + 1});
  }
  for (int64_t head = 0; want_rho && head < call.heads(); ++head) drho.set(head, rho * sum(&v_dv[head * n], n));
}

Call dense_call(const Sizes& size, const Tensor& q, const OptTensor& k, const Tensor& v, double rho,
                const OptTensor& head_rho, const OptTensor& key_mask, const OptTensor& query_mask) {
  return Call(size, q, k, v, rho, head_rho, Kept(query_mask, size.N), Kept(key_mask, size.M),
              same_mask(key_mask, query_mask), key_mask || query_mask);
}

std::tuple<Tensor, Tensor> dense_forward(const Tensor& q, const OptTensor& k, const Tensor& v, double eps, double rho,
                                         const OptTensor& head_rho, const OptTensor& key_mask,
                                         const OptTensor& query_mask, Dtype dtype) {
  const Arguments a = attention_arguments(kOp, q, k, v, eps, rho, head_rho, key_mask, query_mask);
  Call call = dense_call(sizes_of(a), q, k, v, rho, head_rho, key_mask, query_mask);
  const auto [B, H, N, M, d, d_v] = call.size;
  const bool token_major = q.stride(1) < q.stride(2);
  const int64_t token = token_major ? H * d_v : d_v, head = token_major ? d_v : N * d_v;
  const Tensor out = new_tensor({B, H, N, d_v}, {H * N * d_v, head, token, 1}, dtype);
  const Tensor norm = zeros({B, H}, acc_dtype(q));
  if (call.partial) zero(out);
  if (!call.empty()) forward(call, eps, out, norm);
  return {out, norm};
}

// Two gradients of one tensor added up, and their sum rounded.
Tensor sum_in(Dtype dtype, const Tensor& to, const Tensor& other) {
  const Numbers a(to), b(other);
  parallel_for(0, to.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) a.set(i, a[i] + b[i]);
  });
  return to.dtype() == dtype ? to : copy(empty_strided(to.sizes(), to.strides(), dtype), to);
}

template <typename Dot> Gradients dense_backward(Call& call, double eps, const Tensor& dout, const Dot& dout_dot,
                                                 const Tensor& norm, std::array<bool, 4> output_mask, Dtype dtype) {
  const bool want_q = output_mask[0], want_k = output_mask[1] && !call.tied, want_rho = output_mask[3] && call.head_rho;
  // Masks that differ make the scores of a tied k asymmetric: its half of the gradient is then made apart, and added
  // before the sum is rounded.
  const bool apart = want_q && call.tied && !call.symmetric;
  const Dtype half = apart ? acc_dtype(call.q) : dtype;
  const Tensor grad_q = new_gradient(want_q, call.q, call.partial, half),
               grad_k = new_gradient(want_k || apart, call.k, call.partial, half),
               grad_v = new_gradient(output_mask[2], call.v, call.partial, dtype);
  const Tensor grad_rho = want_rho ? zeros({call.size.B, call.size.H}, norm.dtype()) : empty({0}, norm.dtype());
  if (!call.empty()) backward(call, eps, dout, dout_dot, norm, {grad_q, grad_k, grad_v, grad_rho});
  if (!apart) return {grad_q, grad_k, grad_v, grad_rho};
  return {sum_in(dtype, grad_q, grad_k), empty({0}, dtype), grad_v, grad_rho};
}

std::tuple<Tensor, Tensor> pure_fwd(const Tensor& q, const OptTensor& k, const Tensor& v, double eps, double rho,
                                    const OptTensor& head_rho, const OptTensor& key_padding_mask,
                                    const OptTensor& query_padding_mask) {
  return dense_forward(q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask, q.dtype());
}

std::tuple<Tensor, Tensor> pure_block_fwd(const Tensor& q, const OptTensor& k, const Tensor& v, double eps,
                                          const OptTensor& key_padding_mask, const OptTensor& query_padding_mask) {
  return dense_forward(q, k, v, eps, 1, {}, key_padding_mask, query_padding_mask, acc_dtype(q));
}

// The <dout, out> of a chunk of a head's queries.
auto dot_of(const Call& call, const Tensor& dout, const Tensor& out) {
  return [&](int64_t head, Range queries) {
    return call.kernels.tokens.dot(call.tokens(dout, head, call.queries), call.tokens(out, head, call.queries), nullptr,
                                   0, call.size.d_v, queries);
  };
}

Gradients pure_bwd(const Tensor& dout, const Tensor& q, const OptTensor& k, const Tensor& v, const Tensor& out,
                   const Tensor& norm, double eps, double rho, const OptTensor& head_rho,
                   const OptTensor& key_padding_mask, const OptTensor& query_padding_mask,
                   std::array<bool, 4> output_mask) {
  Arguments a = attention_arguments(kOp, q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask);
  a.tensor("dout", dout, q.dtype(), "BHNv");
  a.tensor("out", out, q.dtype(), "BHNv");
  a.tensor("norm", norm, acc_dtype(q), "BH");
  Call call = dense_call(sizes_of(a), q, k, v, rho, head_rho, key_padding_mask, query_padding_mask);
  return dense_backward(call, eps, dout, dot_of(call, dout, out), norm, output_mask, q.dtype());
}

Gradients pure_block_bwd(const Tensor& dout, const Tensor& q, const OptTensor& k, const Tensor& v,
                         const Tensor& dout_out, const Tensor& norm, double eps, double rho, const OptTensor& head_rho,
                         const OptTensor& key_padding_mask, const OptTensor& query_padding_mask,
                         std::array<bool, 4> output_mask) {
  Arguments a = attention_arguments(kOp, q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask);
  a.tensor("dout", dout, q.dtype(), "BHNv");
  a.tensor("dout_out", dout_out, kDouble, "BH");
  a.tensor("norm", norm, acc_dtype(q), "BH");
  Call call = dense_call(sizes_of(a), q, k, v, rho, head_rho, key_padding_mask, query_padding_mask);
  call.whole = false;
  const Numbers of_all(contiguous(dout_out));
  const auto dout_dot = [&](int64_t head, Range queries) { return queries.begin == 0 ? of_all[head] : 0; };
  return dense_backward(call, eps, dout, dout_dot, norm, output_mask, acc_dtype(q));
}

Call packed_call(const PackedArguments& p, const Tensor& q, const OptTensor& k, const Tensor& v, double rho,
                 const OptTensor& head_rho) {
  return {p.sizes(), q, k, v, rho, head_rho, Kept(p.queries.at), Kept(p.keys.at), true, false};
}

std::tuple<Tensor, Tensor> pure_varlen_fwd(const Tensor& q, const OptTensor& k, const Tensor& v,
                                           const Tensor& cu_seqlens_q, const OptTensor& cu_seqlens_k, int64_t max_q,
                                           int64_t max_k, double eps, double rho, const OptTensor& head_rho) {
  const PackedArguments p(kPackedOp, q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, rho, head_rho);
  const int64_t H = q.size(1), d_v = v.size(2);
  const Tensor out = new_tensor({q.size(0), H, d_v}, {H * d_v, d_v, 1}, q.dtype());
  const Tensor norm = zeros({p.queries.sequences(), H}, acc_dtype(q));
  const Tensor queries = as_batch(q, p.queries), values = as_batch(v, p.keys);
  const OptTensor keys = k ? OptTensor(as_batch(*k, p.keys)) : k;
  Call call = packed_call(p, queries, keys, values, rho, head_rho);
  if (call.partial) zero(out);
  if (!call.empty()) forward(call, eps, as_batch(out, p.queries), norm);
  return {out, norm};
}

Gradients pure_varlen_bwd(const Tensor& dout, const Tensor& q, const OptTensor& k, const Tensor& v, const Tensor& out,
                          const Tensor& norm, const Tensor& cu_seqlens_q, const OptTensor& cu_seqlens_k, int64_t max_q,
                          int64_t max_k, double eps, double rho, const OptTensor& head_rho,
                          std::array<bool, 4> output_mask) {
  PackedArguments p(kPackedOp, q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, rho, head_rho);
  p.a.tensor("dout", dout, q.dtype(), "NHv");
  p.a.tensor("out", out, q.dtype(), "NHv");
  p.a.tensor("norm", norm, acc_dtype(q), "SH");
  const Tensor queries = as_batch(q, p.queries), values = as_batch(v, p.keys);
  const OptTensor keys = k ? OptTensor(as_batch(*k, p.keys)) : k;
  Call call = packed_call(p, queries, keys, values, rho, head_rho);
  const Tensor grad_q = new_gradient(output_mask[0], q, call.partial),
               grad_k = new_gradient(output_mask[1] && k, k ? *k : q, call.partial),
               grad_v = new_gradient(output_mask[2], v, call.partial);
  const Tensor grad_rho =
      output_mask[3] && head_rho ? zeros(head_rho->sizes(), norm.dtype()) : empty({0}, norm.dtype());
  const Tensor dout_batch = as_batch(dout, p.queries), out_batch = as_batch(out, p.queries);
  if (!call.empty())
    backward(call, eps, dout_batch, dot_of(call, dout_batch, out_batch), norm,
             {as_batch(grad_q, p.queries), as_batch(grad_k, p.keys), as_batch(grad_v, p.keys), grad_rho});
  return {grad_q, grad_k, grad_v, grad_rho};
}

}  // namespace

INFSA_LIBRARY_IMPL(CPU, m) {
  m.impl("pure_fwd", kernel<pure_fwd>);
  m.impl("pure_bwd", kernel<pure_bwd>);
  m.impl("pure_blocks_fwd", kernel<pure_block_fwd>);
  m.impl("pure_blocks_bwd", kernel<pure_block_bwd>);
  m.impl("pure_varlen_fwd", kernel<pure_varlen_fwd>);
  m.impl("pure_varlen_bwd", kernel<pure_varlen_bwd>);
}

}  // namespace infsa::cpu::pure
