// A call's tensors as kernels take them, on CPUs and GPUs alike: pointers and strides, in elements.
#pragma once

#include <stdint.h>

// Never a function of its own, of which the linker would keep the copy of one instruction set for all machines.
#define INFSA_INLINE inline __attribute__((always_inline))

namespace infsa {

// No data: absent, or not wanted.
struct Rows {
  void* data;
  int64_t batch, head, token, channel;
};

// true = ignore. No data: every token counts.
struct Mask {
  const bool* data;
  int64_t batch, token;
};

INFSA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INFSA_INLINE int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }
INFSA_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace infsa
