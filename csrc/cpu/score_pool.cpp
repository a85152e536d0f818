// The CPU backend of infsa::score_pool_fwd and infsa::score_pool_bwd: checks, memory and the division into tasks. The
// equations are in docs/pooled_linear.md, the arithmetic in score_pool_kernels.h.
//
//   r_j = ReLU(x^_j . key_h + key_bias_h),  R = sum_j r_j,  pooled = sum_j r_j x^_j / (R + eps),  mass = R / (R + eps)
//
// and with score_floor, a number per call, over n tokens that no mask ignores: T = sum_j |x^_j . key_h + key_bias_h|,
//
//   D = R + score_floor T + eps,  pooled = (sum_j r_j x^_j + score_floor T token_mean) / D,  mass = 1 - eps / D
//
// x (B,N,D), keys (B,H,D), key_bias (B,H); pooled (B,H,D), mass, score_sum = R and absolute_sum = T (B,H),
// token_mean = sum_j x^_j / n (B,D). Both directions are one pass
// over the tokens. Parts of an image depend on the shape alone and their sums are added in their order, in double: the
// same bits for any number of threads.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
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
  const int64_t rows, numbers;  // sums of a part: vectors of `width`, and numbers

  Plan(const Images& images, int64_t H, int64_t matrices, bool floor = false)
      : images(images),
        H(H),
        wide(round_up(H, images.kernels.lanes)),
        width(round_up(images.D, images.kernels.panel)),
        matrix_rows(matrices * wide),
        group(std::clamp<int64_t>(kWaveBytes / (images.acc_bytes * (H + matrix_rows) * (width + 1) + 1), 1,
                                  std::max<int64_t>(images.B, 1))),
        most_parts(ceil_div(kParts, group)),
        rows(H + floor),
        numbers(floor ? 2 * H : H) {}

  int64_t sums_bytes() const { return rows * width * images.acc_bytes; }

  // run(part, slot, sums (rows, width), head sums (numbers), scratch) for every part of every image, then with the
  // parts' sums added up finish_tokens(image, total) where there is a row more than heads, and finish(head, total) for
  // every head: total[c], then those of the head sums.
  template <typename Begin, typename Run, typename FinishTokens, typename Finish>
  void for_images(Range range, bool backward, const Begin& begin_image, const Run& run,
                  const FinishTokens& finish_tokens, const Finish& finish) const {
    const int64_t scratch = images.kernels.score_pool.scratch_bytes(images.D, H, backward);
    for (int64_t begin = range.begin; begin < range.end; begin += group) {
      const int64_t end = std::min(begin + group, range.end);
      for (int64_t image = begin; image < end; ++image) begin_image(image, image - begin);
      const std::vector<Part> parts = images.parts(begin, end, most_parts);
      const int64_t count = parts.size();
      const Buffer sums(count * sums_bytes());
      std::vector<double> head_sums(count * numbers);
      run_tasks(count, double(end - begin) * images.N * images.D * H, scratch, [&](int64_t part, void* memory) {
        char* part_sums = sums.data() + part * sums_bytes();
        std::memset(part_sums, 0, sums_bytes());
        run(parts[part], parts[part].image - begin, part_sums, &head_sums[part * numbers], memory);
      });
      const Numbers sum = images.numbers(sums);
      // A row of an image's sums, and behind it the numbers of this row's head.
      const auto add_up = [&](int64_t image, int64_t row, std::vector<double>& total) {
        std::fill(total.begin(), total.end(), 0.0);
        for (int64_t part = 0; part < count; ++part) {
          if (parts[part].image != image) continue;
          for (int64_t c = 0; c < images.D; ++c) total[c] += sum[(part * rows + row) * width + c];
          for (int64_t i = 0; row < H && i < numbers / std::max<int64_t>(H, 1); ++i)
            total[images.D + i] += head_sums[part * numbers + i * H + row];
        }
      };
      std::vector<double> of_tokens(images.D + 2);
      for (int64_t image = begin; image < end && rows > H; ++image) {
        add_up(image, H, of_tokens);
        finish_tokens(image, of_tokens);
      }
      parallel_for(0, (end - begin) * H, 1 + (1 << 15) / (images.D + 1), [&](int64_t from, int64_t to) {
        std::vector<double> total(images.D + 2);
        for (int64_t head = from; head < to; ++head) {
          add_up(begin + head / H, head % H, total);
          finish(begin * H + head, total);
        }
      });
    }
  }

  // A number of every head, as the kernels take those of an image: padded to `wide`, by 0.
  Tensor padded(const std::function<double(int64_t image, int64_t head)>& of) const {
    Tensor all = zeros({images.B, wide + Buffer::kSlack}, images.acc);
    const Numbers to(all);
    for (int64_t image = 0; image < images.B; ++image) {
      for (int64_t h = 0; h < H; ++h) to.set(image * (wide + Buffer::kSlack) + h, of(image, h));
    }
    return all;
  }
  Tensor padded(const OptTensor& t) const {
    if (!t) return zeros({images.B, wide + Buffer::kSlack}, images.acc);
    const Numbers from(*t);
    return padded([&](int64_t image, int64_t h) { return from[image * t->stride(0) + h * t->stride(1)]; });
  }
};

// The i-th of the first dimension.
char* part_of(const Tensor& t, int64_t i) {
  return static_cast<char*>(t.data_ptr()) + i * t.stride(0) * t.element_size();
}

// The tokens of an image that no mask ignores, at least 1.
double token_count(const Images& images, int64_t image) { return std::max<int64_t>(images.kept.count(image), 1); }

Arguments arguments_of(const Tensor& x, const Tensor& keys, const OptTensor& key_bias, std::optional<double> norm_eps,
                       double eps, const OptTensor& padding_mask) {
  Arguments a(kOp, "x", x, "BND");
  a.tensor("keys", keys, acc_dtype(x), "BHD");
  a.tensor("key_bias", key_bias, acc_dtype(x), "BH");
  token_options(a, norm_eps, eps, padding_mask);
  return a;
}

// What forward returns beside the pooled tokens and their mass; the last two with a floor only.
struct Statistics {
  Tensor score_sum, absolute_sum, token_mean;
};

std::tuple<Tensor, Tensor, Statistics> forward(const Tensor& x, const Tensor& keys_, const OptTensor& key_bias,
                                               std::optional<double> norm_eps, double eps, const Floor& floor,
                                               const OptTensor& padding_mask) {
  demand_floor(arguments_of(x, keys_, key_bias, norm_eps, eps, padding_mask), floor);
  const Images images(x, norm_eps, padding_mask);
  const int64_t H = keys_.size(1), D = images.D, floored = floor.has_value();
  const Plan plan(images, H, 1, floored);
  const Tensor keys = contiguous(keys_), bias = plan.padded(key_bias);
  const Tensor pooled = empty({images.B, H, D}, images.acc), mass = empty({images.B, H}, images.acc),
               score_sum = empty({images.B, H}, images.acc), absolute_sum = empty({images.B * floored, H}, images.acc),
               token_mean = empty({images.B * floored, D}, images.acc);
  const Numbers p(pooled), A(mass), R(score_sum), T(absolute_sum), mean(token_mean);
  const int64_t panels_bytes = images.panels_bytes(plan.matrix_rows, D);
  const Buffer panels(plan.group * panels_bytes);
  const bool wide = images.acc == kDouble;
  std::vector<double> units(images.B, 1);  // of an image's scores
  Tensor keys_in_units = keys;
  std::vector<char> strange(images.B * H);
  const auto run = [&](Range range) {
    plan.for_images(
        range, false,
        [&](int64_t image, int64_t slot) {
          images.pack(images.kernels.images.pack_sums, {part_of(keys_in_units, image), D, 1}, H,
                      panels.data() + slot * panels_bytes, nullptr);
        },
        [&](const Part& part, int64_t slot, void* sums, double* score_sums, void* scratch) {
          const ScoreArgs args{
              H, panels.data() + slot * panels_bytes, nullptr, part_of(bias, part.image), nullptr, nullptr, nullptr};
          images.kernels.score_pool.forward(images.image(part.image, {}), args, part.tokens,
                                            {sums, score_sums, floor.has_value()}, scratch);
        },
        [&](int64_t image, const std::vector<double>& total) {
          for (int64_t c = 0; c < D; ++c) mean.set(image * D + c, total[c] / token_count(images, image));
        },
        [&](int64_t head, const std::vector<double>& total) {
          const double unit = units[head / H], sum = total[D], share = floor.value_or(0) * total[D + 1];
          const double norm = sum + share + eps * unit;
          strange[head] = !within(sum, kMostFactor, wide) || !within(total[D + 1], kMostFactor, wide);
          R.set(head, sum / unit);
          if (floor) T.set(head, total[D + 1] / unit);
          A.set(head, (sum + share) / norm);
          for (int64_t c = 0; c < D; ++c) {
            strange[head] |= !std::isfinite(total[c]);
            p.set(head * D + c, (floor ? total[c] + share * mean[head / H * D + c] : total[c]) / norm);
          }
        });
  };
  run({0, images.B});
  // Scores of order one: their products with tokens are in range where the tokens are (range.h).
  for (int64_t image = 0; image < images.B; ++image) {
    if (std::count(strange.begin() + image * H, strange.begin() + (image + 1) * H, 0) == H) continue;
    const Kernels& of_keys = kernels_for(images.acc);
    const Tokens rows{part_of(keys, image), D, 1};
    const double largest =
        norm_eps ? 1 : images.kernels.tokens.largest(images.image(image, {}).x, D, {0, images.kept.count(image)});
    units[image] = unit_of(of_keys.tokens.largest(rows, D, {0, H}), wide) * unit_of(largest, wide);
    if (units[image] == 0 || units[image] == 1) continue;
    if (keys_in_units.get() == keys.get()) keys_in_units = copy(empty(keys.sizes(), images.acc), keys);
    const Numbers all_keys(keys_in_units), all_biases(bias);
    for (int64_t i = image * H * D; i < (image + 1) * H * D; ++i) all_keys.set(i, all_keys[i] * units[image]);
    for (int64_t h = 0; h < H; ++h) {
      const int64_t i = image * bias.stride(0) + h;
      all_biases.set(i, all_biases[i] * units[image]);
    }
    run({image, image + 1});
  }
  return {pooled, mass, {score_sum, absolute_sum, token_mean}};
}

// With g = dpooled / R and offset = g . pooled - dmass eps / R^2, both of one head (R with its eps):
//   dt_j = [t_j > 0] (x^_j . g - offset)    dx^_j = sum_h r_j g + dt_j key    dkeys = sum_j dt_j x^_j    dkey_bias =
//   sum_j dt_j
// With a floor R is D above, dt_j += sign(t_j) m with m = score_floor (g . token_mean - offset), and r_j + c in the
// place of r_j with c = score_floor T / n.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dpooled_, const Tensor& dmass_, const Tensor& x,
                                            const Tensor& keys_, const OptTensor& key_bias, const Tensor& pooled_,
                                            const Statistics& saved, std::optional<double> norm_eps, double eps,
                                            const Floor& floor, const OptTensor& padding_mask,
                                            std::array<bool, 3> output_mask) {
  Arguments arguments = arguments_of(x, keys_, key_bias, norm_eps, eps, padding_mask);
  arguments.tensor("dpooled", dpooled_, acc_dtype(x), "BHD");
  arguments.tensor("pooled", pooled_, acc_dtype(x), "BHD");
  arguments.tensor("dmass", dmass_, acc_dtype(x), "BH");
  arguments.tensor("score_sum", saved.score_sum, acc_dtype(x), "BH");
  demand_floor(arguments, floor);
  if (floor) {
    arguments.tensor("absolute_sum", saved.absolute_sum, acc_dtype(x), "BH");
    arguments.tensor("token_mean", saved.token_mean, acc_dtype(x), "BD");
  }
  const Images images(x, norm_eps, padding_mask);
  const int64_t B = images.B, H = keys_.size(1), D = images.D;
  const bool want_x = output_mask[0], want_keys = output_mask[1], want_bias = output_mask[2] && key_bias;
  const Tensor dx = new_gradient(want_x, x, padding_mask.has_value());
  const Tensor dkeys = want_keys ? empty_like(keys_) : empty({0}, images.acc);
  const Tensor dbias = want_bias ? empty_like(*key_bias) : empty({0}, images.acc);
  if (!want_x && !want_keys && !want_bias) return {dx, dkeys, dbias};

  const Plan plan(images, H, 2);
  const Tensor keys = contiguous(keys_), matrix = zeros({2, plan.wide, D}, images.acc), bias = plan.padded(key_bias);
  const Numbers dpooled(contiguous(dpooled_)), dmass(contiguous(dmass_)), pooled(contiguous(pooled_)),
      R(contiguous(saved.score_sum));
  const Numbers T = floor ? Numbers(contiguous(saved.absolute_sum)) : R,
                mean = floor ? Numbers(contiguous(saved.token_mean)) : R;
  const auto norm = [&](int64_t head) { return R[head] + (floor ? *floor * T[head] : 0) + eps; };
  const auto of_mass = [&](int64_t head) { return dmass[head] * eps / (norm(head) * norm(head)); };
  // sum_c g_c of(c), with g of a head.
  const auto dot = [&](int64_t head, const auto& of) {
    double total = 0;
    for (int64_t c = 0; c < D; ++c) total += dpooled[head * D + c] * of(c);
    return total / norm(head);
  };
  const Tensor offset = plan.padded([&](int64_t image, int64_t h) {
    const int64_t head = image * H + h;
    return dot(head, [&](int64_t c) { return pooled[head * D + c]; }) - of_mass(head);
  });
  Tensor share, dabsolute;
  if (floor) {
    share =
        plan.padded([&](int64_t image, int64_t h) { return *floor * T[image * H + h] / token_count(images, image); });
    dabsolute = plan.padded([&](int64_t image, int64_t h) {
      const int64_t head = image * H + h;
      return *floor *
             (dot(head, [&](int64_t c) { return mean[image * D + c] - pooled[head * D + c]; }) + of_mass(head));
    });
  }
  const auto of_image = [](const Tensor& t, int64_t image) { return t.defined() ? part_of(t, image) : nullptr; };
  const int64_t panels_bytes = images.panels_bytes(plan.matrix_rows, D);
  const int64_t columns_bytes = want_x ? images.panels_bytes(D, plan.matrix_rows) : 0;
  const Buffer panels(plan.group * panels_bytes), columns(plan.group * columns_bytes);
  const Numbers dkeys_of(dkeys), dbias_of(dbias), gradients(matrix);

  plan.for_images(
      {0, B}, true,
      [&](int64_t image, int64_t slot) {
        std::memcpy(matrix.data_ptr(), part_of(keys, image), H * D * images.acc_bytes);
        for (int64_t head = image * H; head < (image + 1) * H; ++head) {
          const double of_head = norm(head);
          const int64_t to = (plan.wide + head % H) * D;
          for (int64_t c = 0; c < D; ++c) gradients.set(to + c, dpooled[head * D + c] / of_head);
        }
        images.pack(images.kernels.images.pack_sums, {matrix.data_ptr(), D, 1}, plan.matrix_rows,
                    panels.data() + slot * panels_bytes, want_x ? columns.data() + slot * columns_bytes : nullptr);
      },
      [&](const Part& part, int64_t slot, void* sums, double* bias_sums, void* scratch) {
        const ScoreArgs args{H,
                             panels.data() + slot * panels_bytes,
                             columns.data() + slot * columns_bytes,
                             of_image(bias, part.image),
                             of_image(offset, part.image),
                             of_image(share, part.image),
                             of_image(dabsolute, part.image)};
        images.kernels.score_pool.backward(images.image(part.image, dx), args, part.tokens, want_keys ? sums : nullptr,
                                           want_bias ? bias_sums : nullptr, scratch);
      },
      [](int64_t, const std::vector<double>&) {},
      [&](int64_t head, const std::vector<double>& total) {
        const auto place = [&](const Tensor& t) { return head / H * t.stride(0) + head % H * t.stride(1); };
        if (want_keys) {
          const int64_t to = place(dkeys), step = dkeys.stride(2);
          for (int64_t c = 0; c < D; ++c) dkeys_of.set(to + c * step, total[c]);
        }
        if (want_bias) dbias_of.set(place(dbias), total[D]);
      });
  return {dx, dkeys, dbias};
}

std::tuple<Tensor, Tensor, Tensor> score_pool_fwd(const Tensor& x, const Tensor& keys, const OptTensor& key_bias,
                                                  std::optional<double> norm_eps, double eps,
                                                  const OptTensor& padding_mask) {
  auto [pooled, mass, s] = forward(x, keys, key_bias, norm_eps, eps, {}, padding_mask);
  return {std::move(pooled), std::move(mass), std::move(s.score_sum)};
}

std::tuple<Tensor, Tensor, Tensor> score_pool_bwd(const Tensor& dpooled, const Tensor& dmass, const Tensor& x,
                                                  const Tensor& keys, const OptTensor& key_bias, const Tensor& pooled,
                                                  const Tensor& score_sum, std::optional<double> norm_eps, double eps,
                                                  const OptTensor& padding_mask, std::array<bool, 3> output_mask) {
  const Statistics saved{score_sum, {}, {}};
  return backward(dpooled, dmass, x, keys, key_bias, pooled, saved, norm_eps, eps, {}, padding_mask, output_mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> score_pool_floor_fwd(const Tensor& x, const Tensor& keys,
                                                                        const OptTensor& key_bias,
                                                                        std::optional<double> norm_eps, double eps,
                                                                        double score_floor,
                                                                        const OptTensor& padding_mask) {
  auto [pooled, mass, s] = forward(x, keys, key_bias, norm_eps, eps, score_floor, padding_mask);
  return {std::move(pooled), std::move(mass), std::move(s.score_sum), std::move(s.absolute_sum),
          std::move(s.token_mean)};
}

std::tuple<Tensor, Tensor, Tensor> score_pool_floor_bwd(const Tensor& dpooled, const Tensor& dmass, const Tensor& x,
                                                        const Tensor& keys, const OptTensor& key_bias,
                                                        const Tensor& pooled, const Tensor& score_sum,
                                                        const Tensor& absolute_sum, const Tensor& token_mean,
                                                        std::optional<double> norm_eps, double eps, double score_floor,
                                                        const OptTensor& padding_mask,
                                                        std::array<bool, 3> output_mask) {
  const Statistics saved{score_sum, absolute_sum, token_mean};
  return backward(dpooled, dmass, x, keys, key_bias, pooled, saved, norm_eps, eps, score_floor, padding_mask,
                  output_mask);
}

}  // namespace

INFSA_LIBRARY_IMPL(CPU, m) {
  m.impl("score_pool_fwd", kernel<score_pool_fwd>);
  m.impl("score_pool_bwd", kernel<score_pool_bwd>);
  m.impl("score_pool_floor_fwd", kernel<score_pool_floor_fwd>);
  m.impl("score_pool_floor_bwd", kernel<score_pool_floor_bwd>);
}

}  // namespace infsa::cpu
