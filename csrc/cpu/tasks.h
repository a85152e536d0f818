// How the block kernels' callers divide their work: tokens that count, and tasks for threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "../check.h"
#include "memory.h"
#include "parallel.h"
#include "tokens.h"

namespace infsa::cpu {

// With fewer multiplications than this, waking other threads costs more than they bring.
constexpr double kSerialWork = 1 << 19;

// The positions of the tokens that count, batch by batch; all of them without a mask.
struct Kept {
  int64_t all;
  std::vector<std::vector<int64_t>> positions;

  Kept(const OptTensor& mask, int64_t tokens) : all(tokens) {
    if (!mask) return;
    const Mask ignored = mask_of(mask);
    for (int64_t b = 0; b < mask->size(0); ++b) {
      auto& kept = positions.emplace_back();
      for (int64_t i = 0; i < tokens; ++i) {
        if (!ignored.data[b * ignored.batch + i * ignored.token]) kept.push_back(i);
      }
    }
  }
  // Batches whose tokens lie one behind another, each from one of these positions to the next.
  explicit Kept(const std::vector<int64_t>& packed) : all(packed.back()), positions(packed.size() - 1) {
    for (size_t b = 0; b < positions.size(); ++b) {
      for (int64_t i = packed[b]; i < packed[b + 1]; ++i) positions[b].push_back(i);
    }
  }
  int64_t count(int64_t b) const { return positions.empty() ? all : static_cast<int64_t>(positions[b].size()); }
  const int64_t* of(int64_t b) const { return positions.empty() ? nullptr : positions[b].data(); }
};

// Into how many pieces `count` tasks are cut, `most` at most, so that no thread waits long for the last. For tasks
// whose pieces make the same bits as the whole: the number of threads may choose.
inline int64_t pieces_for_threads(int64_t count, int64_t most) {
  const int64_t threads = get_num_threads();
  if (count == 0 || count >= 2 * threads) return 1;
  return std::clamp<int64_t>(ceil_div(4 * threads, count), 1, std::max<int64_t>(most, 1));
}

// task(t, memory) for every t; a free thread takes the next one.
template <typename Task> void run_tasks(int64_t count, double work, int64_t bytes, const Task& task) {
  std::atomic<int64_t> next{0};
  const int64_t threads = work < kSerialWork ? 1 : std::min<int64_t>(count, get_num_threads());
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      const Buffer memory(bytes);
      for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(t, memory.data());
    }
  });
}

// The sum of numbers in their order.
inline double sum(const double* x, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += x[i];
  return total;
}

}  // namespace infsa::cpu
