// The CPU backend of infsa::central_query_fwd and infsa::central_query_bwd: checks, memory and the division into tasks.
// The equations are in docs/pooled_linear.md, the arithmetic in layer_kernels.h.
//
//   y_i = W_h x^_i + b_h,  u_i = s y_i,  E = sum_i ||u_i||,  qbar = sum_i ||u_i|| u_i / (E + eps)       s = 1 / sqrt(d)
//
// x (B,N,D), weight (H,d,D), bias (H,d); central_query = qbar (B,H,d) and energy_sum = E (B,H). The queries y live for
// one block of tokens, in cache, in both directions. The gradient of W is a product over all tokens: a wave of blocks
// leaves dq and x^ packed, and then every tile of it is added to by one task. Blocks, waves and tiles depend on the
// shape alone: the bits do not depend on the number of threads.
#include <torch/library.h>

#include <array>
#include <cmath>
#include <tuple>

#include "../check_tokens.h"
#include "layer_call.h"

namespace infsa::cpu {
namespace {

constexpr const char* kOp = "infsa::central_query";
// Tiles of channels that one task of the weight's gradient takes: with a panel of x^ they stay in L2.
constexpr int64_t kTaskTiles = 24;

struct Weight {
  const int64_t H, d, C;
  const double scale;
  Tensor panels, columns, bias;

  Weight(const LayerCall& call, const Tensor& weight, const OptTensor& bias, bool as_columns)
      : H(weight.size(0)),
        d(weight.size(1)),
        C(H * d),
        scale(d ? 1 / std::sqrt(static_cast<double>(d)) : 1),
        panels(buffer(call.panels_bytes(C, call.D))),
        columns(buffer(as_columns ? call.panels_bytes(call.D, C) : 0)),
        bias(buffer(C * call.acc_bytes + kLayerSlack)) {
    const Tensor flat = weight.reshape({C, call.D});
    call.pack(call.kernels.pack, {flat.data_ptr(), flat.stride(0), flat.stride(1), nullptr}, C, panels.data_ptr(),
              as_columns ? columns.data_ptr() : nullptr);
    this->bias.zero_();
    if (bias && C) std::memcpy(this->bias.data_ptr(), bias->contiguous().data_ptr(), C * call.acc_bytes);
  }

  QueryArgs args() const { return {H, d, panels.data_ptr(), columns.data_ptr(), bias.data_ptr(), nullptr, nullptr}; }
};

std::tuple<Tensor, Tensor> central_query_fwd(const Tensor& x, const Tensor& weight_, const OptTensor& bias,
                                             std::optional<double> norm_eps, double eps,
                                             const OptTensor& padding_mask) {
  check::central_query_arguments(kOp, x, weight_, bias, norm_eps, eps, padding_mask);
  const LayerCall call(x, norm_eps, padding_mask);
  const Weight weight(call, weight_, bias, false);
  const int64_t H = weight.H, d = weight.d, C = weight.C;
  const Tensor central_query = at::empty({call.B, H, d}, x.options().dtype(call.acc));
  const Tensor energy_sum = at::empty({call.B, H}, central_query.options());

  const std::vector<Part> parts = call.parts(0, call.B, ceil_div(kParts, std::max<int64_t>(call.B, 1)));
  const int64_t count = parts.size();
  std::vector<double> sums((count + call.B) * (C + H));
  const QueryArgs args = weight.args();
  run_tasks(count, double(call.B) * call.N * call.D * C, call.kernels.query_scratch(call.D, C, false),
            [&](int64_t part, void* scratch) {
              const auto [image, tokens] = parts[part];
              call.kernels.query_forward(call.tokens(image, {}), args, tokens, &sums[part * (C + H)], scratch);
            });
  double* totals = &sums[count * (C + H)];
  for (int64_t part = 0; part < count; ++part) {
    for (int64_t i = 0; i < C + H; ++i) totals[parts[part].image * (C + H) + i] += sums[part * (C + H) + i];
  }
  AT_DISPATCH_FLOATING_TYPES(call.acc, "central_query_fwd", [&] {
    for (int64_t head = 0; head < call.B * H; ++head) {
      const double* total = totals + head / H * (C + H);
      const double energy = weight.scale * total[C + head % H];
      energy_sum.mutable_data_ptr<scalar_t>()[head] = static_cast<scalar_t>(energy);
      for (int64_t c = 0; c < d; ++c) {
        central_query.mutable_data_ptr<scalar_t>()[head * d + c] =
            static_cast<scalar_t>(weight.scale * weight.scale * total[head % H * d + c] / (energy + eps));
      }
    }
  });
  return {central_query, energy_sum};
}

// With g = s^2 dqbar / E and offset = s qbar . dqbar / E, both of one head:
//   dq_i = ||y_i|| g + (y_i . g - offset) y_i / ||y_i||      dx^ = dq W      dW = dq^T x^      db = sum_i dq_i
struct HeadGradients {
  Tensor gradient, offset;  // (B, C) and (B, H), of the accumulation type

  HeadGradients(const LayerCall& call, const Weight& w, const Tensor& dcentral_query, const Tensor& central_query,
                const Tensor& energy_sum, double eps)
      : gradient(buffer(call.B * w.C * call.acc_bytes + kLayerSlack)), offset(buffer(call.B * w.H * call.acc_bytes)) {
    AT_DISPATCH_FLOATING_TYPES(call.acc, "central_query_bwd", [&] {
      const scalar_t *dqbar = dcentral_query.const_data_ptr<scalar_t>(),
                     *qbar = central_query.const_data_ptr<scalar_t>();
      for (int64_t head = 0; head < call.B * w.H; ++head) {
        const double factor = w.scale / (energy_sum.const_data_ptr<scalar_t>()[head] + eps);
        double dot = 0;
        for (int64_t c = head * w.d; c < (head + 1) * w.d; ++c) {
          dot += factor * dqbar[c] * qbar[c];
          static_cast<scalar_t*>(gradient.data_ptr())[c] = static_cast<scalar_t>(factor * w.scale * dqbar[c]);
        }
        static_cast<scalar_t*>(offset.data_ptr())[head] = static_cast<scalar_t>(dot);
      }
      // What the kernels read behind the last head.
      std::memset(static_cast<char*>(gradient.data_ptr()) + call.B * w.C * call.acc_bytes, 0, kLayerSlack);
    });
  }
};

std::tuple<Tensor, Tensor, Tensor> central_query_bwd(const Tensor& dcentral_query, const Tensor& x,
                                                     const Tensor& weight_, const OptTensor& bias,
                                                     const Tensor& central_query, const Tensor& energy_sum,
                                                     std::optional<double> norm_eps, double eps,
                                                     const OptTensor& padding_mask, std::array<bool, 3> output_mask) {
  check::central_query_arguments(kOp, x, weight_, bias, norm_eps, eps, padding_mask);
  const LayerCall call(x, norm_eps, padding_mask);
  const int64_t H = weight_.size(0), d = weight_.size(1), B = call.B, D = call.D;
  check::statistic(kOp, "dcentral_query", dcentral_query, x, {B, H, d}, "(B, H, d)", "x");
  check::statistic(kOp, "central_query", central_query, x, {B, H, d}, "(B, H, d)", "x");
  check::statistic(kOp, "energy_sum", energy_sum, x, {B, H}, "(B, H)", "x");
  const bool want_x = output_mask[0], want_weight = output_mask[1], want_bias = output_mask[2] && bias;
  const Tensor dx = call.gradient(want_x, padding_mask.has_value());
  const Tensor dweight = want_weight ? at::empty_like(weight_) : at::empty({0}, x.options());
  const auto sums_options = x.options().dtype(call.acc);
  const Tensor dbias = want_bias ? at::empty_like(*bias) : at::empty({0}, sums_options);
  if (!want_x && !want_weight && !want_bias) return {dx, dweight, dbias};

  const Weight weight(call, weight_, bias, want_x);
  const int64_t C = weight.C;
  const HeadGradients heads(call, weight, dcentral_query.contiguous(), central_query.contiguous(),
                            energy_sum.contiguous(), eps);
  const LayerKernels& kernels = call.kernels;
  const int64_t width = round_up(D, kernels.panel), channels = round_up(C, kernels.tile);
  // Rows that need neither padding nor rounding are summed in place.
  const bool in_place = want_weight && dweight.scalar_type() == call.acc && dweight.is_contiguous() && width == D;
  const Tensor weight_sums = in_place ? dweight.zero_() : at::zeros({want_weight ? C : 0, width}, sums_options);
  std::vector<double> bias_sums(want_bias ? C : 0);

  const std::vector<Part> blocks = call.parts(0, B);
  int64_t tokens = 0;
  for (const Part& block : blocks) tokens += block.tokens.end - block.tokens.begin;
  Wave wave{};
  wave.tokens = std::min(tokens, std::max(kernels.block(D), kWaveBytes / ((C + D + 1) * call.acc_bytes)));
  const Tensor query_tiles = buffer(want_weight || want_bias ? channels * wave.tokens * call.acc_bytes : 0);
  const Tensor token_panels = buffer(want_weight ? width * wave.tokens * call.acc_bytes : 0);
  if (want_weight || want_bias) wave.query_tiles = query_tiles.data_ptr();
  if (want_weight) wave.token_panels = token_panels.data_ptr();

  const double token_work = double(D) * C * ((want_x ? 2 : 1) + want_weight);
  const int64_t scratch_bytes = kernels.query_scratch(D, C, true), blocks_count = blocks.size();
  const int64_t tiles = ceil_div(C, kernels.tile), tile_tasks = ceil_div(tiles, kTaskTiles);
  std::vector<int64_t> at;
  for (int64_t first = 0; first < blocks_count; first += at.size()) {
    int64_t filled = 0;
    at.clear();
    for (int64_t i = first; i < blocks_count; ++i) {
      const int64_t count = blocks[i].tokens.end - blocks[i].tokens.begin;
      if (filled + count > wave.tokens) break;
      at.push_back(filled);
      filled += count;
    }
    run_tasks(at.size(), filled * token_work, scratch_bytes, [&](int64_t i, void* scratch) {
      const auto [image, range] = blocks[first + i];
      QueryArgs args = weight.args();
      args.gradient = bytes_of(heads.gradient) + image * C * call.acc_bytes;
      args.offset = bytes_of(heads.offset) + image * H * call.acc_bytes;
      kernels.query_backward(call.tokens(image, dx), args, range, wave, at[i], scratch);
    });
    const auto tiles_of = [&](int64_t task) {
      return Range{task * kTaskTiles, std::min((task + 1) * kTaskTiles, tiles)};
    };
    if (want_weight) {
      run_tasks(tile_tasks * (width / kernels.panel), filled * token_work, 0, [&](int64_t task, void*) {
        kernels.weight_gradient(wave, filled, C, D, tiles_of(task % tile_tasks), task / tile_tasks,
                                weight_sums.data_ptr());
      });
    }
    if (want_bias) {
      run_tasks(tile_tasks, double(filled) * C, 0,
                [&](int64_t task, void*) { kernels.bias_gradient(wave, filled, C, tiles_of(task), bias_sums.data()); });
    }
  }
  for (int64_t h = 0; h < H && want_weight && !in_place; ++h) {
    const Tensor head = dweight.select(0, h);
    kernels.store({head.data_ptr(), head.stride(0), head.stride(1), nullptr}, {0, d}, D,
                  static_cast<char*>(weight_sums.data_ptr()) + h * d * width * call.acc_bytes, width);
  }
  if (want_bias) dbias.copy_(at::from_blob(bias_sums.data(), {H, d}, at::kDouble));
  return {dx, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(infsa, CPU, m) {
  m.impl("central_query_fwd", TORCH_FN(central_query_fwd));
  m.impl("central_query_bwd", TORCH_FN(central_query_bwd));
}

}  // namespace infsa::cpu
