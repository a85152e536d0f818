// Launchers of Linear-InfSA on raw pointers, so that neither side includes the other's headers.
#pragma once

#include "linear_plan.h"

namespace infsa::cuda {

enum class Element { float32, bfloat16, float16 };

inline int bytes_of(Element element) { return element == Element::float32 ? 4 : 2; }

// q (B,H,N,d), k (B,H,M,d), v (B,H,M,d_v), masks (B,N) and (B,M), head_rho (B,H); statistics contiguous. Tied: k is q.
struct LinearArgs {
  Rows q, k, v;
  Mask query_mask, key_mask;
  const float* head_rho;
  int64_t rho_b, rho_h;
  int64_t B, H, N, M;
  int d, d_v;
  float scale, eps, rho;
  bool tied, floored;  // floored: with a floor under the scores, which may be 0
  float floor;
  float *context, *central_query, *energy_sum, *score_sum;  // (B,H,d_v), (B,H,d), (B,H), (B,H)
  float *absolute_sum, *value_mean;                         // (B,H), (B,H,d_v); floored only
  void* out;                                                // (B,H,d_v)
  float *first_parts, *second_parts;                        // plan.parts_size() each
  // Backward. dk of a tied call is in dq.
  Rows dout;                   // (B,H,d_v): token is unused
  Rows dq, dk, dv;             // like q, k, v
  float *dhead_rho, *dscores;  // (B,H), and (B,H,N) where tied and dq is wanted
  LinearPlan plan;
};

// Whether every row can be read and written 16 bytes at a time.
inline bool has_aligned_rows(const LinearArgs& a, Element element) {
  const int64_t chunk = 16 / bytes_of(element);
  const auto aligned = [&](const Rows& r) {
    return !r.data || (reinterpret_cast<uintptr_t>(r.data) % 16 == 0 && r.channel == 1 && r.batch % chunk == 0 &&
                       r.head % chunk == 0 && r.token % chunk == 0);
  };
  return a.d % kLaneElements == 0 && a.d_v % kLaneElements == 0 && aligned(a.q) && aligned(a.k) && aligned(a.v) &&
         aligned(a.dq) && aligned(a.dk) && aligned(a.dv);
}

inline LinearPlan linear_plan(const LinearArgs& a, Element element, bool backward, LinearDevice device) {
  const auto token_major = [](const Rows& r) { return r.head < r.token; };
  return linear_plan(a.B, a.H, a.N, a.M, a.d, a.d_v, bytes_of(element),
                     token_major(a.q) && token_major(a.k) && token_major(a.v), a.tied && !backward,
                     a.floored && !backward, device);
}

// Which kernel.
struct LinearKind {
  Element element;
  bool aligned, backward, floored;
  auto operator<=>(const LinearKind&) const = default;
};

// Of the current device.
LinearDevice linear_device(LinearKind kind);

// What the CUDA runtime says went wrong, or null.
struct LaunchFailure {
  const char* reason = nullptr;
  bool too_many_blocks = false;  // more than run at once: other work, or a partition, has its part of the GPU
};

// `stream` is a cudaStream_t.
LaunchFailure launch_linear(const LinearArgs& args, LinearKind kind, void* stream);

// Calls launch(device) until the grid fits: the driver speaks of the whole GPU, of which this context may have a part.
template <typename Launch> LaunchFailure launch_where_it_fits(LinearDevice device, const Launch& launch) {
  LaunchFailure failure = launch(device);
  while (failure.too_many_blocks && device.resident_blocks > 1) {
    device.resident_blocks /= 2;
    failure = launch(device);
  }
  return failure;
}

}  // namespace infsa::cuda
