// Tokens as the CPU kernels take them.
#pragma once

#include "../rows.h"

namespace infsa::cpu {

// The tokens of one head, or of one image. Strides are in elements; kept[i] is the position of the i-th token that
// counts; null: all do.
struct Tokens {
  void* data = nullptr;
  int64_t token = 0, channel = 0;
  const int64_t* kept = nullptr;
};

// Those of one head.
INFSA_INLINE Tokens tokens_of(const Rows& rows, int64_t b, int64_t h, int64_t element_bytes,
                              const int64_t* kept = nullptr) {
  char* data = static_cast<char*>(rows.data) + (b * rows.batch + h * rows.head) * element_bytes;
  return {data, rows.token, rows.channel, kept};
}

struct Range {
  int64_t begin, end;

  INFSA_INLINE int64_t size() const { return end - begin; }
};

// Of one dtype. Sums are rows of the accumulation type, `stride` apart, and the padding behind their ends is 0.
struct TokenKernels {
  // to[i] = scale * sums[i], rounded, over these tokens.
  void (*store)(const Tokens& to, const void* sums, int64_t stride, int64_t columns, double scale, Range);
  // The largest |x|, and of the sums; NaN where one is.
  double (*largest)(const Tokens& x, int64_t columns, Range);
  double (*largest_sum)(const void* sums, int64_t stride, Range);
  // <x, y>; where y has no data, <x, sums>. In float64.
  double (*dot)(const Tokens& x, const Tokens& y, const void* sums, int64_t stride, int64_t columns, Range);
};

}  // namespace infsa::cpu
