// How torch lays out a tensor that is like another.
#pragma once

#include <numeric>
#include <utility>

#include "torch.h"

namespace infsa {

// Whether the elements fill their memory, each of them once.
inline bool is_dense(IntArrayRef sizes, IntArrayRef strides) {
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    const bool a_is_one = sizes[a] < 2, b_is_one = sizes[b] < 2;
    return a_is_one || b_is_one ? !a_is_one && b_is_one : strides[a] < strides[b];
  });
  int64_t stride = 1;
  for (const size_t i : order) {
    if (sizes[i] < 2) return true;
    if (strides[i] != stride) return false;
    stride *= sizes[i];
  }
  return true;
}

// The strides of torch.empty_like: the same where they are dense, else dense ones in their order.
inline std::vector<int64_t> dense_strides(IntArrayRef sizes, IntArrayRef strides) {
  const int64_t dim = sizes.size();
  if (is_dense(sizes, strides)) return {strides.begin(), strides.end()};
  // From the innermost dimension out. A stride of 0 says nothing of the order.
  std::vector<int64_t> order(dim);
  std::iota(order.rbegin(), order.rend(), 0);
  for (int64_t i = 1; i < dim; ++i) {
    for (int64_t outer = i, at = i - 1; at >= 0; --at) {
      const int64_t a = order[at], b = order[outer];
      if (strides[a] == 0 || strides[b] == 0) continue;
      if (strides[a] < strides[b]) break;
      if (strides[a] == strides[b] && sizes[a] <= sizes[b]) continue;
      std::swap(order[at], order[outer]);
      outer = at;
    }
  }
  std::vector<int64_t> dense(dim);
  int64_t stride = 1;
  for (const int64_t i : order) {
    dense[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  return dense;
}

inline Tensor empty_like(const Tensor& t) {
  return empty_strided(t.sizes(), dense_strides(t.sizes(), t.strides()), t.dtype(), t.device());
}

}  // namespace infsa
