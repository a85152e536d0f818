// Rows of a tensor as the kernels take them.
#pragma once

#include <stdint.h>

namespace infsa::cpu {

// The tokens of one head, or of one image. Strides are in elements; kept[i] is the position of the i-th token that
// counts; null: all do.
struct Tokens {
  void* data = nullptr;
  int64_t row = 0, col = 0;
  const int64_t* kept = nullptr;
};

struct Range {
  int64_t begin, end;
};

}  // namespace infsa::cpu
