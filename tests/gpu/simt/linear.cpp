// Linear-InfSA's CUDA kernels (csrc/cuda/linear_kernels.cuh, as shipped) on the host, for tests/test_cuda_on_host.py.
#include <algorithm>

#include "simt.h"
//
#include "linear_kernels.cuh"

using namespace infsa;
using namespace infsa::cuda;

namespace {

template <typename T, bool kAligned, bool kBackward, bool kFloor> void run(const LinearArgs& a, uint64_t seed) {
  simt::Machine machine(a.plan.blocks, kThreads, a.plan.cluster ? int(a.plan.splits) : 1, a.plan.shared_bytes, seed);
  machine.run([&](void* shared) {
    if (a.plan.cluster) {
      linear_cluster<T, kAligned, kBackward, kFloor>(a, shared);
    } else {
      simt::GridBarrier barrier;
      linear_grid<T, kAligned, kBackward, kFloor>(a, shared, barrier);
    }
  });
}

template <typename T, bool kFloor> void run(const LinearArgs& a, LinearKind kind, uint64_t seed) {
  if (kind.backward) {
    kind.aligned ? run<T, true, true, kFloor>(a, seed) : run<T, false, true, kFloor>(a, seed);
  } else {
    kind.aligned ? run<T, true, false, kFloor>(a, seed) : run<T, false, false, kFloor>(a, seed);
  }
}

template <typename T> void run(const LinearArgs& a, LinearKind kind, uint64_t seed) {
  kind.floored ? run<T, true>(a, kind, seed) : run<T, false>(a, kind, seed);
}

}  // namespace

// Returns 1 for a cluster, 0 for a grid, 2 more for aligned rows, -1 for an error.
extern "C" int run_linear(const LinearArgs* arguments, int element, int backward, int unaligned, uint64_t seed) {
  LinearArgs a = *arguments;
  const Element type = static_cast<Element>(element);
  const LinearKind kind{type, !unaligned && has_aligned_rows(a, type), backward != 0, a.floored};
  std::vector<float> parts(2 * a.plan.parts_size(), NAN);
  a.first_parts = parts.data(), a.second_parts = parts.data() + a.plan.parts_size();
  try {
    switch (type) {
      case Element::float32:
        run<float>(a, kind, seed);
        break;
      case Element::bfloat16:
        run<BFloat16>(a, kind, seed);
        break;
      case Element::float16:
        run<Float16>(a, kind, seed);
    }
  } catch (const std::exception&) {
    return -1;
  }
  return 2 * kind.aligned + a.plan.cluster;
}
