// Launchers of Linear-InfSA on raw pointers, so that neither side includes the other's headers.
#pragma once

#include "linear_plan.h"

namespace infsa::cuda {

enum class Element { float32, bfloat16, float16 };

inline int bytes_of(Element element) { return element == Element::float32 ? 4 : 2; }

// Strides in elements. Without data: not wanted.
struct Rows {
  void* data;
  int64_t b, h, n, d;
};
struct Mask {
  const bool* data;
  int64_t b, n;
};

// q (B,H,N,d), k (B,H,M,d), v (B,H,M,dv), masks (B,N) and (B,M), head_rho (B,H); statistics contiguous. Tied: k is q.
struct LinearArgs {
  Rows q, k, v;
  Mask query_mask, key_mask;
  const float* head_rho;
  int64_t rho_b, rho_h;
  int64_t B, H, N, M;
  int d, dv;
  float scale, eps, rho;
  bool tied;
  float *context, *central_query, *energy_sum, *score_sum;  // (B,H,dv), (B,H,d), (B,H), (B,H)
  void* out;                                                // (B,H,dv)
  float *first_parts, *second_parts;                        // plan.parts_size() each
  // Backward. dk of a tied call is in dq.
  Rows dout;                   // (B,H,dv): n is unused
  Rows dq, dk, dv_;            // like q, k, v
  float *dhead_rho, *dscores;  // (B,H), and (B,H,N) where tied and dq is wanted
  LinearPlan plan;
};

// Whether every row can be read and written 16 bytes at a time.
inline bool has_aligned_rows(const LinearArgs& a, Element element) {
  const int64_t chunk = 16 / bytes_of(element);
  const auto aligned = [&](const Rows& r) {
    return !r.data || (reinterpret_cast<uintptr_t>(r.data) % 16 == 0 && r.d == 1 && r.b % chunk == 0 &&
                       r.h % chunk == 0 && r.n % chunk == 0);
  };
  return a.d % kLaneElements == 0 && a.dv % kLaneElements == 0 && aligned(a.q) && aligned(a.k) && aligned(a.v) &&
         aligned(a.dq) && aligned(a.dk) && aligned(a.dv_);
}

inline LinearPlan linear_plan(const LinearArgs& a, Element element, bool backward, LinearDevice device) {
  const auto token_major = [](const Rows& r) { return r.h < r.n; };
  return linear_plan(a.B, a.H, a.N, a.M, a.d, a.dv, bytes_of(element),
                     token_major(a.q) && token_major(a.k) && token_major(a.v), a.tied && !backward, device);
}

// Of the current device.
LinearDevice linear_device(Element element, bool aligned, bool backward);

// Returns null, or what the CUDA runtime says went wrong. `stream` is a cudaStream_t.
const char* launch_linear(const LinearArgs& args, Element element, bool aligned, bool backward, void* stream);

}  // namespace infsa::cuda
