// What a launch of Linear-InfSA's CUDA kernels is given (csrc/cuda/linear.h), for tests that have no GPU.
#include <algorithm>
#include <cmath>
#include <compare>
#include <iterator>

#include "linear.h"

using namespace infsa;
using namespace infsa::cuda;

namespace {

Rows rows_of(void* data, const int64_t* strides) { return {data, strides[0], strides[1], strides[2], strides[3]}; }

}  // namespace

// plan: what PLAN in tests/cuda_on_host.py names.
extern "C" void plan_linear(const int64_t* sizes, int element_bytes, int token_major, int keep_queries, int floor,
                            int resident_blocks, int64_t largest_shared, int64_t wave_bytes, int64_t* plan) {
  const LinearPlan p = linear_plan(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], element_bytes,
                                   token_major, keep_queries, floor, {resident_blocks, largest_shared, wave_bytes});
  const int64_t values[] = {p.lanes,    p.heads,      p.columns, p.slots,  p.units,   p.splits,       p.query_span,
                            p.key_span, p.wave_units, p.waves,   p.blocks, p.cluster, p.shared_bytes, p.part_size()};
  std::copy(std::begin(values), std::end(values), plan);
}

// The arguments of a launch as the device gets them, into `to` of sizeof(LinearArgs) bytes: tensors in the order of
// LinearArgs, strides of four dimensions each, two pointers for partial sums. A floor below 0 is none. Returns the
// floats that each of these points to.
extern "C" int64_t linear_arguments(const int64_t* sizes, int element, int tied, int backward, double eps, double floor,
                                    double rho, void** tensors, const int64_t* strides, int resident_blocks,
                                    int64_t largest_shared, int64_t wave_bytes, LinearArgs* to) {
  const auto s = [&](int i) { return strides + 4 * i; };
  LinearArgs a{};
  a.B = sizes[0], a.H = sizes[1], a.N = sizes[2], a.M = sizes[3];
  a.d = static_cast<int>(sizes[4]), a.d_v = static_cast<int>(sizes[5]);
  a.scale = a.d ? 1 / std::sqrt(static_cast<float>(a.d)) : 1, a.eps = static_cast<float>(eps),
  a.rho = static_cast<float>(rho);
  a.tied = tied, a.floored = floor >= 0, a.floor = static_cast<float>(floor);
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
  a.absolute_sum = static_cast<float*>(tensors[17]), a.value_mean = static_cast<float*>(tensors[18]);
  a.first_parts = static_cast<float*>(tensors[19]), a.second_parts = static_cast<float*>(tensors[20]);
  a.plan = linear_plan(a, static_cast<Element>(element), backward, {resident_blocks, largest_shared, wave_bytes});
  *to = a;
  return a.plan.parts_size();
}

extern "C" int64_t bytes_of_arguments() { return sizeof(LinearArgs); }
extern "C" int has_aligned(const LinearArgs* a, int element) {
  return has_aligned_rows(*a, static_cast<Element>(element));
}
extern "C" void grid_of(const LinearArgs* a, int64_t* blocks_threads_shared) {
  blocks_threads_shared[0] = a->plan.blocks, blocks_threads_shared[1] = kThreads;
  blocks_threads_shared[2] = a->plan.shared_bytes;
}
