// The CPU backend of infsa::central_query_fwd and infsa::central_query_bwd: checks, memory and the division into tasks.
// The equations are in docs/pooled_linear.md, the arithmetic in central_query_kernels.h.
//
//   y_i = W_h x^_i + b_h,  u_i = s y_i,  E = sum_i ||u_i||,  qbar = sum_i ||u_i|| u_i / (E + eps)       s = 1 / sqrt(d)
//
// x (B,N,D), weight (H,d,D), bias (H,d); central_query = qbar (B,H,d) and energy_sum = E (B,H). The queries y live for
// one block of tokens, in cache, in both directions. The gradient of W is a product over all tokens: a wave of blocks
// leaves dq and x^ packed, and then every tile of it is added to by one task. Blocks, waves and tiles, within which
// sums over tokens are made and in whose order they are added up, depend on the shape alone: the bits do not depend on
// the number of threads. What is no sum over tokens is cut further where there are many threads.
#include <array>
#include <cmath>
#include <tuple>

#include "images.h"

namespace infsa::cpu {
namespace {

constexpr const char* kOp = "infsa::central_query";
// Tiles of channels that one task of the weight's gradient takes: with a panel of x^ they stay in L2.
constexpr int64_t kTaskTiles = 24;

// The weight as the kernels take it, and its bias.
struct Weight {
  const int64_t H, d, C;
  const double scale;
  Buffer panels, columns, bias;

  Weight(const Images& images, const Tensor& weight, const OptTensor& bias_, bool as_columns)
      : H(weight.size(0)),
        d(weight.size(1)),
        C(H * d),
        scale(scale_of(d)),
        panels(images.panels_bytes(C, images.D)),
        columns(as_columns ? images.panels_bytes(images.D, C) : 0),
        bias(C * images.acc_bytes) {
    // Its heads' channels one behind another.
    const Tensor flat = d < 2 || H < 2 || weight.stride(0) == d * weight.stride(1) ? weight : contiguous(weight);
    images.pack(images.kernels.images.pack, {flat.data_ptr(), flat.stride(d < 2 ? 0 : 1), flat.stride(2)}, C,
                panels.data(), as_columns ? columns.data() : nullptr);
    std::memset(bias.data(), 0, C * images.acc_bytes + Buffer::kSlack);
    if (bias_ && C) std::memcpy(bias.data(), contiguous(*bias_).data_ptr(), C * images.acc_bytes);
  }

  QueryArgs args() const { return {H, d, panels.data(), columns.data(), bias.data(), nullptr, nullptr}; }
};

Arguments arguments_of(const Tensor& x, const Tensor& weight, const OptTensor& bias, std::optional<double> norm_eps,
                       double eps, const OptTensor& padding_mask) {
  Arguments a(kOp, "x", x, "BND");
  a.tensor("weight", weight, x.dtype(), "HdD");
  a.tensor("bias", bias, acc_dtype(x), "Hd");
  token_options(a, norm_eps, eps, padding_mask);
  return a;
}

std::tuple<Tensor, Tensor> central_query_fwd(const Tensor& x, const Tensor& weight_, const OptTensor& bias,
                                             std::optional<double> norm_eps, double eps,
                                             const OptTensor& padding_mask) {
  arguments_of(x, weight_, bias, norm_eps, eps, padding_mask);
  const Images images(x, norm_eps, padding_mask);
  const Weight weight(images, weight_, bias, false);
  const int64_t H = weight.H, d = weight.d, C = weight.C;
  const Tensor central_query = empty({images.B, H, d}, images.acc);
  const Tensor energy_sum = empty({images.B, H}, images.acc);

  const std::vector<Part> parts = images.parts(0, images.B, ceil_div(kParts, std::max<int64_t>(images.B, 1)));
  const int64_t count = parts.size();
  std::vector<double> sums((count + images.B) * (C + H));
  const QueryArgs args = weight.args();
  const int64_t shares = pieces_for_threads(count, H);
  run_tasks(count * shares, double(images.B) * images.N * images.D * C,
            images.kernels.central_query.scratch_bytes(images.D, C, false), [&](int64_t task, void* scratch) {
              const int64_t part = task / shares;
              const auto [image, tokens] = parts[part];
              images.kernels.central_query.forward(images.image(image, {}), args, tokens, task % shares, shares,
                                                   sums.data() + part * (C + H), scratch);
            });
  double* totals = sums.data() + count * (C + H);
  for (int64_t part = 0; part < count; ++part) {
    for (int64_t i = 0; i < C + H; ++i) totals[parts[part].image * (C + H) + i] += sums[part * (C + H) + i];
  }
  const Numbers qbar(central_query), E(energy_sum);
  for (int64_t head = 0; head < images.B * H; ++head) {
    const double* total = totals + head / H * (C + H);
    const double energy = weight.scale * total[C + head % H];
    E.set(head, energy);
    for (int64_t c = 0; c < d; ++c)
      qbar.set(head * d + c, weight.scale * weight.scale * total[head % H * d + c] / (energy + eps));
  }
  return {central_query, energy_sum};
}

// Blocks that leave dq and x^ side by side for one product: where each begins, and all their tokens.
struct WaveOfBlocks {
  Range blocks;
  std::vector<int64_t> at;
  int64_t tokens;
};

std::vector<WaveOfBlocks> waves_of(const std::vector<Part>& blocks, int64_t most_tokens) {
  std::vector<WaveOfBlocks> waves;
  for (int64_t i = 0; i < int64_t(blocks.size()); ++i) {
    const int64_t count = blocks[i].tokens.size();
    if (waves.empty() || waves.back().tokens + count > most_tokens) waves.push_back({{i, i}, {}, 0});
    WaveOfBlocks& wave = waves.back();
    wave.at.push_back(wave.tokens);
    wave.tokens += count;
    wave.blocks.end = i + 1;
  }
  return waves;
}

// With g = s^2 dqbar / E and offset = s qbar . dqbar / E, both of one head:
//   dq_i = ||y_i|| g + (y_i . g - offset) y_i / ||y_i||      dx^ = dq W      dW = dq^T x^      db = sum_i dq_i
std::tuple<Tensor, Tensor, Tensor> central_query_bwd(const Tensor& dcentral_query, const Tensor& x,
                                                     const Tensor& weight_, const OptTensor& bias,
                                                     const Tensor& central_query, const Tensor& energy_sum,
                                                     std::optional<double> norm_eps, double eps,
                                                     const OptTensor& padding_mask, std::array<bool, 3> output_mask) {
  Arguments arguments = arguments_of(x, weight_, bias, norm_eps, eps, padding_mask);
  arguments.tensor("dcentral_query", dcentral_query, acc_dtype(x), "BHd");
  arguments.tensor("central_query", central_query, acc_dtype(x), "BHd");
  arguments.tensor("energy_sum", energy_sum, acc_dtype(x), "BH");
  const Images images(x, norm_eps, padding_mask);
  const int64_t H = weight_.size(0), d = weight_.size(1), B = images.B, D = images.D;
  const bool want_x = output_mask[0], want_weight = output_mask[1], want_bias = output_mask[2] && bias;
  const Tensor dx = new_gradient(want_x, x, padding_mask.has_value());
  const Tensor dweight = new_gradient(want_weight, weight_);
  const Tensor dbias = want_bias ? empty_like(*bias) : empty({0}, images.acc);
  if (!want_x && !want_weight && !want_bias) return {dx, dweight, dbias};

  const Weight weight(images, weight_, bias, want_x);
  const int64_t C = weight.C;
  const Buffer gradients(B * C * images.acc_bytes), offsets(B * H * images.acc_bytes);
  const Numbers dqbar(contiguous(dcentral_query)), qbar(contiguous(central_query)), E(contiguous(energy_sum));
  const Numbers g = images.numbers(gradients), offset = images.numbers(offsets);
  for (int64_t head = 0; head < B * H; ++head) {
    const double factor = weight.scale / (E[head] + eps);
    double dot = 0;
    for (int64_t c = head * d; c < (head + 1) * d; ++c) {
      dot += factor * dqbar[c] * qbar[c];
      g.set(c, factor * weight.scale * dqbar[c]);
    }
    offset.set(head, dot);
  }
  // What the kernels read behind the last head.
  std::memset(gradients.data() + B * C * images.acc_bytes, 0, Buffer::kSlack);
  const Kernels& kernels = images.kernels;
  const int64_t width = round_up(D, kernels.panel), channels = round_up(C, kernels.tile);
  // Rows that need neither padding nor rounding are summed in place.
  const bool in_place = want_weight && dweight.dtype() == images.acc && dweight.is_contiguous() && width == D;
  const Tensor weight_sums = in_place ? zero(dweight) : zeros({want_weight ? C : 0, width}, images.acc);
  std::vector<double> bias_sums(want_bias ? C : 0);

  const std::vector<Part> blocks = images.parts(0, B);
  int64_t tokens = 0;
  for (const Part& block : blocks) tokens += block.tokens.size();
  const int64_t wave_tokens =
      std::min(tokens, std::max(kernels.images.block(D), kWaveBytes / ((C + D + 1) * images.acc_bytes)));
  const std::vector<WaveOfBlocks> waves = waves_of(blocks, wave_tokens);
  const int64_t waves_count = waves.size();
  // Waves in work at once: enough for their blocks to employ the threads.
  const int64_t together =
      waves.empty() ? 0 : std::min(ceil_div(get_num_threads(), waves[0].blocks.size()), waves_count);
  const int64_t tiles_bytes = want_weight || want_bias ? channels * wave_tokens * images.acc_bytes : 0;
  const int64_t panels_bytes = want_weight ? width * wave_tokens * images.acc_bytes : 0;
  const Buffer query_tiles(together * tiles_bytes), token_panels(together * panels_bytes);
  const auto memory_of = [&](int64_t wave) {
    const int64_t slot = wave % together;
    return Wave{tiles_bytes ? query_tiles.data() + slot * tiles_bytes : nullptr,
                panels_bytes ? token_panels.data() + slot * panels_bytes : nullptr, wave_tokens};
  };

  const double token_work = double(D) * C * ((want_x ? 2 : 1) + want_weight);
  const int64_t scratch_bytes = kernels.central_query.scratch_bytes(D, C, true);
  const int64_t tiles = ceil_div(C, kernels.tile), tile_tasks = ceil_div(tiles, kTaskTiles);
  for (int64_t first = 0; first < waves_count; first += together) {
    const int64_t last = std::min(first + together, waves_count);
    const Range some{waves[first].blocks.begin, waves[last - 1].blocks.end};
    double filled = 0;
    for (int64_t w = first; w < last; ++w) filled += waves[w].tokens;
    const int64_t pieces = pieces_for_threads(some.size(), kernels.images.block(D) / kLeastBlock);
    run_tasks(some.size() * pieces, filled * token_work, scratch_bytes, [&](int64_t task, void* scratch) {
      const int64_t block = some.begin + task / pieces;
      int64_t w = first;
      while (waves[w].blocks.end <= block) ++w;
      const auto [image, range] = blocks[block];
      const int64_t step = round_up(ceil_div(range.size(), pieces), kernels.tile);
      const int64_t from = std::min(task % pieces * step, range.size()), to = std::min(from + step, range.size());
      if (from == to) return;
      QueryArgs args = weight.args();
      args.gradient = gradients.data() + image * C * images.acc_bytes;
      args.offset = offsets.data() + image * H * images.acc_bytes;
      kernels.central_query.backward(images.image(image, dx), args, {range.begin + from, range.begin + to},
                                     memory_of(w), waves[w].at[block - waves[w].blocks.begin] + from, scratch);
    });
    const auto tiles_of = [&](int64_t task) {
      return Range{task * kTaskTiles, std::min((task + 1) * kTaskTiles, tiles)};
    };
    if (want_weight) {
      run_tasks(tile_tasks * (width / kernels.panel), filled * token_work, 0, [&](int64_t task, void*) {
        for (int64_t w = first; w < last; ++w)
          kernels.central_query.weight_gradient(memory_of(w), waves[w].tokens, C, D, tiles_of(task % tile_tasks),
                                                task / tile_tasks, weight_sums.data_ptr());
      });
    }
    if (want_bias) {
      run_tasks(tile_tasks, filled * C, 0, [&](int64_t task, void*) {
        for (int64_t w = first; w < last; ++w)
          kernels.central_query.bias_gradient(memory_of(w), waves[w].tokens, C, tiles_of(task), bias_sums.data());
      });
    }
  }
  for (int64_t h = 0; h < H && want_weight && !in_place; ++h) {
    char* head = static_cast<char*>(dweight.data_ptr()) + h * dweight.stride(0) * dweight.element_size();
    kernels.tokens.store({head, dweight.stride(1), dweight.stride(2)},
                         static_cast<char*>(weight_sums.data_ptr()) + h * d * width * images.acc_bytes, width, D, 1,
                         {0, d});
  }
  if (want_bias) {
    const Numbers to(dbias);
    for (int64_t c = 0; c < C; ++c) to.set(c / d * dbias.stride(0) + c % d * dbias.stride(1), bias_sums[c]);
  }
  return {dx, dweight, dbias};
}

}  // namespace

INFSA_LIBRARY_IMPL(CPU, m) {
  m.impl("central_query_fwd", kernel<central_query_fwd>);
  m.impl("central_query_bwd", kernel<central_query_bwd>);
}

}  // namespace infsa::cpu
