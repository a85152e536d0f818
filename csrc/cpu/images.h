// What central_query.cpp and score_pool.cpp have in common: tokens x (B, N, D) and how they are divided.
#pragma once

#include <optional>
#include <vector>

#include "isa.h"
#include "memory.h"
#include "tasks.h"

namespace infsa::cpu {

// Sums of an image are made in at most about so many parts, which are then added in their order.
constexpr int64_t kParts = 16;
// An image with few tokens is still cut into so many blocks, of no fewer tokens than kLeastBlock, to employ threads.
constexpr int64_t kBlocks = 16, kLeastBlock = 24;
// What is in work between two passes over it, or waits to be added up.
constexpr int64_t kWaveBytes = 8 << 20;

// Some tokens of one image.
struct Part {
  int64_t image;
  Range tokens;
};

struct Images {
  const Tensor& x;
  const int64_t B, N, D;
  const std::optional<double> norm_eps;
  const Kept kept;
  const Kernels& kernels;
  const Dtype acc;
  const int64_t acc_bytes;

  Images(const Tensor& x, std::optional<double> norm_eps, const OptTensor& padding_mask)
      : x(x),
        B(x.size(0)),
        N(x.size(1)),
        D(x.size(2)),
        norm_eps(norm_eps),
        kept(padding_mask, N),
        kernels(kernels_for(x.dtype())),
        acc(acc_dtype(x)),
        acc_bytes(acc == kDouble ? 8 : 4) {}

  // dx: of no elements where it is not wanted.
  Image image(int64_t at, const Tensor& dx) const {
    const auto tokens = [&](const Tensor& t) {
      return tokens_of({t.data_ptr(), t.stride(0), 0, t.stride(1), t.stride(2)}, at, 0, t.element_size(), kept.of(at));
    };
    return {
        tokens(x),           dx.defined() && dx.dim() == 3 ? tokens(dx) : Tokens{}, D, block(at), norm_eps.has_value(),
        norm_eps.value_or(0)};
  }

  Numbers numbers(const Buffer& buffer) const { return {buffer, acc == kDouble}; }

  // Blocks of one image are about equal.
  int64_t block(int64_t image) const {
    const int64_t n = kept.count(image), blocks = std::max(ceil_div(n, kernels.images.block(D)),
                                                           std::min(ceil_div(n, kLeastBlock), ceil_div(kBlocks, B)));
    return std::max<int64_t>(
        1, std::min(kernels.images.block(D), round_up(ceil_div(n, std::max<int64_t>(blocks, 1)), 12)));
  }

  // Images [begin, end) in parts of whole blocks, by default of one.
  std::vector<Part> parts(int64_t begin, int64_t end, int64_t most = INT64_MAX) const {
    std::vector<Part> all;
    for (int64_t image = begin; image < end; ++image) {
      const int64_t n = kept.count(image), size = block(image), blocks = ceil_div(n, size);
      const int64_t step = size * ceil_div(blocks, std::min(most, std::max<int64_t>(blocks, 1)));
      for (int64_t at = 0; at < n; at += step) all.push_back({image, {at, std::min(at + step, n)}});
    }
    return all;
  }

  // Of a matrix (rows, columns) of the accumulation type, packed either way.
  int64_t panels_bytes(int64_t rows, int64_t columns) const {
    return round_up(rows, kernels.panel) * columns * acc_bytes;
  }

  void pack(ImageKernels::Pack pack, const Tokens& from, int64_t rows, void* panels, void* columns) const {
    const int64_t grain = std::max<int64_t>(1, (1 << 15) / (kernels.panel * D + 1));
    parallel_for(0, ceil_div(rows, kernels.panel), grain,
                 [&](int64_t begin, int64_t end) { pack(from, rows, D, {begin, end}, panels, columns); });
  }
};

}  // namespace infsa::cpu
