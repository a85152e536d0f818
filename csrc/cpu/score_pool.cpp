// The CPU backend of infsa::score_pool_fwd and infsa::score_pool_bwd: checks, memory and the division into tasks. The
// equations are in docs/pooled_linear.md, the arithmetic in score_pool_kernels.h.
//
//   r_j = ReLU(x^_j . key_h + key_bias_h),  R = sum_j r_j,  pooled = sum_j r_j x^_j / (R + eps),  mass = R / (R + eps)
//
// x (B,N,D), keys (B,H,D), key_bias (B,H); pooled (B,H,D), mass and score_sum = R (B,H). Both directions are one pass
// over the tokens. Parts of an image depend on the shape alone and their sums are added in their order, in double: the
// same bits for any number of threads.
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>

#include "images.h"
#include "range.h"

namespace infsa::cpu {
namespace {

constexpr const char* kOp = "infsa::score_pool";

// Images go through in groups: sums of their parts and packed matrices for all of them at once could be large.
struct Plan {
  const Images& images;
  const int64_t H, wide, width;      // heads, padded to vectors; channels, padded to panels
  const int64_t matrix_rows, group;  // of the packed matrix of an image; images
  const int64_t most_parts;

  Plan(const Images& images, int64_t H, int64_t matrices)
      : images(images),
        H(H),
        wide(round_up(H, images.kernels.lanes)),
        width(round_up(images.D, images.kernels.panel)),
        matrix_rows(matrices * wide),
        group(std::clamp<int64_t>(kWaveBytes / (images.acc_bytes * (H + matrix_rows) * (width + 1) + 1), 1,
                                  std::max<int64_t>(images.B, 1))),
        most_parts(ceil_div(kParts, group)) {}

  int64_t sums_bytes() const { return H * width * images.acc_bytes; }

  // run(image, part, sums (H, width), head sums (H), scratch) for every part of every image, then finish(image, total)
  // with the parts' sums added up: total(h, c) and, for c = D, of the head sums.
  template <typename Begin, typename Run, typename Finish>
  void for_images(Range range, bool backward, const Begin& begin_image, const Run& run, const Finish& finish) const {
    const int64_t scratch = images.kernels.score_pool.scratch_bytes(images.D, H, backward);
    for (int64_t begin = range.begin; begin < range.end; begin += group) {
      const int64_t end = std::min(begin + group, range.end);
      for (int64_t image = begin; image < end; ++image) begin_image(image, image - begin);
      const std::vector<Part> parts = images.parts(begin, end, most_parts);
      const int64_t count = parts.size();
      const Buffer sums(count * sums_bytes());
      std::vector<double> head_sums(count * H);
      run_tasks(count, double(end - begin) * images.N * images.D * H, scratch, [&](int64_t part, void* memory) {
        char* part_sums = sums.data() + part * sums_bytes();
        std::memset(part_sums, 0, sums_bytes());
        run(parts[part], parts[part].image - begin, part_sums, &head_sums[part * H], memory);
      });
      const Numbers sum = images.numbers(sums);
      at::parallel_for(0, (end - begin) * H, 1 + (1 << 15) / (images.D + 1), [&](int64_t from, int64_t to) {
        std::vector<double> total(images.D + 1);
        for (int64_t head = from; head < to; ++head) {
          const int64_t image = begin + head / H, h = head % H;
          std::fill(total.begin(), total.end(), 0.0);
          for (int64_t part = 0; part < count; ++part) {
            if (parts[part].image != image) continue;
            for (int64_t c = 0; c < images.D; ++c) total[c] += sum[(part * H + h) * width + c];
            total[images.D] += head_sums[part * H + h];
          }
          finish(image * H + h, total);
        }
      });
    }
  }

  // A vector of every image padded to `wide`, 0 where there is none.
  Tensor padded(const OptTensor& t) const {
    Tensor all = at::zeros({images.B, wide + Buffer::kSlack}, images.x.options().dtype(images.acc));
    if (t) all.narrow(1, 0, H).copy_(*t);
    return all;
  }
};

Arguments arguments_of(const Tensor& x, const Tensor& keys, const OptTensor& key_bias, std::optional<double> norm_eps,
                       double eps, const OptTensor& padding_mask) {
  Arguments a(kOp, "x", x, "BND");
  a.tensor("keys", keys, acc_dtype(x), "BHD");
  a.tensor("key_bias", key_bias, acc_dtype(x), "BH");
  token_options(a, norm_eps, eps, padding_mask);
  return a;
}

std::tuple<Tensor, Tensor, Tensor> score_pool_fwd(const Tensor& x, const Tensor& keys_, const OptTensor& key_bias,
                                                  std::optional<double> norm_eps, double eps,
                                                  const OptTensor& padding_mask) {
  arguments_of(x, keys_, key_bias, norm_eps, eps, padding_mask);
  const Images images(x, norm_eps, padding_mask);
  const int64_t H = keys_.size(1), D = images.D;
  const Plan plan(images, H, 1);
  const Tensor keys = keys_.contiguous(), bias = plan.padded(key_bias);
  const Tensor pooled = at::empty({images.B, H, D}, keys.options());
  const Tensor mass = at::empty({images.B, H}, keys.options()), score_sum = at::empty({images.B, H}, keys.options());
  const Numbers p(pooled), A(mass), R(score_sum);
  const int64_t panels_bytes = images.panels_bytes(plan.matrix_rows, D);
  const Buffer panels(plan.group * panels_bytes);
  const bool wide = images.acc == at::kDouble;
  std::vector<double> units(images.B, 1);  // of an image's scores
  std::vector<char> strange(images.B * H);
  const auto run = [&](Range range) {
    plan.for_images(
        range, false,
        [&](int64_t image, int64_t slot) {
          const Tensor matrix = units[image] == 1 ? keys.select(0, image) : keys.select(0, image) * units[image];
          images.pack(images.kernels.images.pack_sums, {matrix.data_ptr(), D, 1}, H,
                      panels.data() + slot * panels_bytes, nullptr);
        },
        [&](const Part& part, int64_t slot, void* sums, double* score_sums, void* scratch) {
          const ScoreArgs args{H, panels.data() + slot * panels_bytes, nullptr, bias.select(0, part.image).data_ptr(),
                               nullptr};
          images.kernels.score_pool.forward(images.image(part.image, {}), args, part.tokens, sums, score_sums, scratch);
        },
        [&](int64_t head, const std::vector<double>& total) {
          const double unit = units[head / H], sum = total[D], norm = sum + eps * unit;
          strange[head] = !within(sum, kMostFactor, wide);
          R.set(head, sum / unit);
          A.set(head, sum / norm);
          for (int64_t c = 0; c < D; ++c) {
            strange[head] |= !std::isfinite(total[c]);
            p.set(head * D + c, total[c] / norm);
          }
        });
  };
  run({0, images.B});
  // Scores of order one: their products with tokens are in range where the tokens are (range.h).
  for (int64_t image = 0; image < images.B; ++image) {
    if (std::count(strange.begin() + image * H, strange.begin() + (image + 1) * H, 0) == H) continue;
    const Kernels& of_keys = kernels_for(images.acc);
    const Tokens rows{keys.select(0, image).data_ptr(), D, 1};
    const double largest =
        norm_eps ? 1 : images.kernels.tokens.largest(images.image(image, {}).x, D, {0, images.kept.count(image)});
    units[image] = unit_of(of_keys.tokens.largest(rows, D, {0, H}), wide) * unit_of(largest, wide);
    if (units[image] == 0 || units[image] == 1) continue;
    bias.select(0, image).mul_(units[image]);
    run({image, image + 1});
  }
  return {pooled, mass, score_sum};
}

// With g = dpooled / R and offset = g . pooled - dmass eps / R^2, both of one head (R with its eps):
//   dt_j = [t_j > 0] (x^_j . g - offset)    dx^_j = sum_h r_j g + dt_j key    dkeys = sum_j dt_j x^_j    dkey_bias =
//   sum_j dt_j
std::tuple<Tensor, Tensor, Tensor> score_pool_bwd(const Tensor& dpooled, const Tensor& dmass, const Tensor& x,
                                                  const Tensor& keys, const OptTensor& key_bias, const Tensor& pooled,
                                                  const Tensor& score_sum, std::optional<double> norm_eps, double eps,
                                                  const OptTensor& padding_mask, std::array<bool, 3> output_mask) {
  Arguments arguments = arguments_of(x, keys, key_bias, norm_eps, eps, padding_mask);
  arguments.tensor("dpooled", dpooled, acc_dtype(x), "BHD");
  arguments.tensor("pooled", pooled, acc_dtype(x), "BHD");
  arguments.tensor("dmass", dmass, acc_dtype(x), "BH");
  arguments.tensor("score_sum", score_sum, acc_dtype(x), "BH");
  const Images images(x, norm_eps, padding_mask);
  const int64_t B = images.B, H = keys.size(1), D = images.D;
  const bool want_x = output_mask[0], want_keys = output_mask[1], want_bias = output_mask[2] && key_bias;
  const Tensor dx = new_gradient(want_x, x, padding_mask.has_value()), none = at::empty({0}, keys.options());
  const Tensor dkeys = want_keys ? at::empty({B, H, D}, keys.options()) : none;
  const Tensor dbias = want_bias ? at::empty({B, H}, keys.options()) : none;
  if (!want_x && !want_keys && !want_bias) return {dx, dkeys, dbias};

  const Plan plan(images, H, 2);
  const Tensor R = score_sum + eps, g = dpooled / R.unsqueeze(-1);
  const Tensor offset = plan.padded((g * pooled).sum(-1) - dmass * eps / R.square()), bias = plan.padded(key_bias);
  const int64_t panels_bytes = images.panels_bytes(plan.matrix_rows, D);
  const int64_t columns_bytes = want_x ? images.panels_bytes(D, plan.matrix_rows) : 0;
  const Buffer panels(plan.group * panels_bytes), columns(plan.group * columns_bytes);
  const Numbers dkeys_of(dkeys);
  const Tensor matrix = at::zeros({2, plan.wide, D}, keys.options());

  plan.for_images(
      {0, B}, true,
      [&](int64_t image, int64_t slot) {
        matrix.select(0, 0).narrow(0, 0, H).copy_(keys.select(0, image));
        matrix.select(0, 1).narrow(0, 0, H).copy_(g.select(0, image));
        images.pack(images.kernels.images.pack_sums, {matrix.data_ptr(), D, 1}, plan.matrix_rows,
                    panels.data() + slot * panels_bytes, want_x ? columns.data() + slot * columns_bytes : nullptr);
      },
      [&](const Part& part, int64_t slot, void* sums, double* bias_sums, void* scratch) {
        const ScoreArgs args{H, panels.data() + slot * panels_bytes, columns.data() + slot * columns_bytes,
                             bias.select(0, part.image).data_ptr(), offset.select(0, part.image).data_ptr()};
        images.kernels.score_pool.backward(images.image(part.image, dx), args, part.tokens, want_keys ? sums : nullptr,
                                           want_bias ? bias_sums : nullptr, scratch);
      },
      [&](int64_t head, const std::vector<double>& total) {
        for (int64_t c = 0; c < D && want_keys; ++c) dkeys_of.set(head * D + c, total[c]);
        if (want_bias) Numbers(dbias).set(head, total[D]);
      });
  return {dx, want_keys && !keys.is_contiguous() ? at::empty_like(keys).copy_(dkeys) : dkeys,
          want_bias && !key_bias->is_contiguous() ? at::empty_like(*key_bias).copy_(dbias) : dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(infsa, CPU, m) {
  m.impl("score_pool_fwd", TORCH_FN(score_pool_fwd));
  m.impl("score_pool_bwd", TORCH_FN(score_pool_bwd));
}

}  // namespace infsa::cpu
