// Linear-InfSA's CUDA kernels (csrc/cuda/linear_kernels.cuh, as shipped) on the host, for tests/test_cuda_on_host.py.
#include <algorithm>

#include "simt.h"
//
#include "linear_kernels.cuh"

using namespace infsa;
using namespace infsa::cuda;

namespace {

template <typename T, bool kAligned, bool kBackward> void run(const LinearArgs& a, uint64_t seed) {
  simt::Machine machine(a.plan.blocks, kThreads, a.plan.cluster ? int(a.plan.splits) : 1, a.plan.shared_bytes, seed);
  machine.run([&](void* shared) {
    if (a.plan.cluster) {
      linear_cluster<T, kAligned, kBackward>(a, shared);
    } else {
      simt::GridBarrier barrier;
      linear_grid<T, kAligned, kBackward>(a, shared, barrier);
    }
  });
}

template <typename T> void run(const LinearArgs& a, bool aligned, bool backward, uint64_t seed) {
  if (backward) {
    aligned ? run<T, true, true>(a, seed) : run<T, false, true>(a, seed);
  } else {
    aligned ? run<T, true, false>(a, seed) : run<T, false, false>(a, seed);
  }
}

Rows rows_of(void* data, const int64_t* strides) { return {data, strides[0], strides[1], strides[2], strides[3]}; }

}  // namespace

// plan: what PLAN in tests/cuda_on_host.py names.
extern "C" void plan_linear(const int64_t* sizes, int element_bytes, int token_major, int keep_queries,
                            int resident_blocks, int64_t largest_shared, int64_t wave_bytes, int64_t* plan) {
  const LinearPlan p = linear_plan(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], element_bytes,
                                   token_major, keep_queries, {resident_blocks, largest_shared, wave_bytes});
  const int64_t values[] = {p.lanes,    p.heads,      p.columns, p.slots,  p.units,   p.splits,       p.query_span,
                            p.key_span, p.wave_units, p.waves,   p.blocks, p.cluster, p.shared_bytes, p.part_size()};
  std::copy(std::begin(values), std::end(values), plan);
}

// Tensors in the order of LinearArgs, strides of four dimensions each; returns 1 for a cluster, 0 for a grid, -1 for an
// error.
extern "C" int run_linear(const int64_t* sizes, int element, int tied, int backward, double eps, double rho,
                          void** tensors, const int64_t* strides, int resident_blocks, int64_t largest_shared,
                          int64_t wave_bytes, int unaligned, uint64_t seed) {
  const auto s = [&](int i) { return strides + 4 * i; };
  LinearArgs a{};
  a.B = sizes[0], a.H = sizes[1], a.N = sizes[2], a.M = sizes[3];
  a.d = static_cast<int>(sizes[4]), a.d_v = static_cast<int>(sizes[5]);
  a.scale = a.d ? 1 / std::sqrt(static_cast<float>(a.d)) : 1, a.eps = static_cast<float>(eps),
  a.rho = static_cast<float>(rho);
  a.tied = tied;
  a.q = rows_of(tensors[0], s(0)), a.k = rows_of(tensors[1], s(1)), a.v = rows_of(tensors[2], s(2));
  a.query_mask = {static_cast<const bool*>(tensors[3]), s(3)[0], s(3)[1]};
  a.key_mask = {static_cast<const bool*>(tensors[4]), s(4)[0], s(4)[1]};
  a.head_rho = static_cast<const float*>(tensors[5]), a.rho_b = s(5)[0], a.rho_h = s(5)[1];
  float** statistics[] = {&a.context, &a.central_query, &a.energy_sum, &a.score_sum};
  for (int i = 0; i < 4; ++i) *statistics[i] = static_cast<float*>(tensors[6 + i]);
  a.out = tensors[10];
  a.dout = rows_of(tensors[11], s(11));
  a.dq = rows_of(tensors[12], s(12)), a.dk = rows_of(tensors[13], s(13)), a.dv = rows_of(tensors[14], s(14));
  a.dhead_rho = static_cast<float*>(tensors[15]), a.dscores = static_cast<float*>(tensors[16]);

  const Element type = static_cast<Element>(element);
  const bool aligned = !unaligned && has_aligned_rows(a, type);
  a.plan = linear_plan(a, type, backward, {resident_blocks, largest_shared, wave_bytes});
  std::vector<float> parts(2 * a.plan.parts_size(), NAN);
  a.first_parts = parts.data(), a.second_parts = parts.data() + a.plan.parts_size();
  try {
    switch (type) {
      case Element::float32:
        run<float>(a, aligned, backward, seed);
        break;
      case Element::bfloat16:
        run<BFloat16>(a, aligned, backward, seed);
        break;
      case Element::float16:
        run<Float16>(a, aligned, backward, seed);
    }
  } catch (const std::exception&) {
    return -1;
  }
  return 2 * aligned + a.plan.cluster;
}
