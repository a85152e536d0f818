// Loops over torch's own threads: neither the compiler's OpenMP nor its runtime is asked for.
#pragma once

#include <atomic>
#include <exception>

#include "../torch.h"

namespace infsa::cpu {

inline int64_t get_num_threads() {
  uint32_t threads;
  succeed(torch_get_num_threads(&threads), "count its threads");
  return threads;
}

// body(begin, end) for ranges of at least `grain` that make up this one.
template <typename Body> void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end) return;
  if (end - begin <= grain) return body(begin, end);
  struct Loop {
    const Body& body;
    std::atomic<bool> failed{false};
    std::exception_ptr error;
  } loop{body};
  const auto run = [](int64_t from, int64_t to, void* context) {
    auto& loop = *static_cast<Loop*>(context);
    try {
      loop.body(from, to);
    } catch (...) {
      // Nothing but an error code would come back through torch.
      if (!loop.failed.exchange(true)) loop.error = std::current_exception();
    }
  };
  succeed(torch_parallel_for(begin, end, grain, run, &loop), "run a loop");
  if (loop.error) std::rethrow_exception(loop.error);
}

}  // namespace infsa::cpu
