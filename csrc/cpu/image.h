// What central_query.cpp and score_pool.cpp both hand to the kernels of one instruction set (image_block.h).
#pragma once

#include "tokens.h"

namespace infsa::cpu {

// The tokens of one image, and where their gradient goes (no data: not wanted). With norm, the kernels see every token
// x^ = (x - mean) / sqrt(var + norm_eps) in the place of x.
struct Image {
  Tokens x, dx;
  int64_t D, block;  // channels, and the tokens in work at a time
  bool norm;
  double norm_eps;
};

// A matrix M (rows, columns) is packed as panels, M transposed: the right side of a product with x (., columns). Packed
// as columns, it is the right side of a product with something (., rows). Both in the accumulation type.
struct ImageKernels {
  // The most tokens that may be in work at a time.
  int64_t (*block)(int64_t D);
  // Packs the panels of `range`, `panel` rows each, and these rows as columns unless null. The source has the call's
  // dtype, or for pack_sums the accumulation type.
  using Pack = void (*)(const Tokens& from, int64_t rows, int64_t columns, Range range, void* panels,
                        void* packed_columns);
  Pack pack, pack_sums;
};

}  // namespace infsa::cpu
