// The few primitives of a GPU that the kernels use. tests/gpu/simt has the same ones for the host.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <utility>

#define INFSA_DEVICE __device__ __forceinline__

namespace infsa::cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

INFSA_DEVICE void round_to(float& to, float x) { to = x; }
INFSA_DEVICE void round_to(BFloat16& to, float x) { to = __float2bfloat16_rn(x); }
INFSA_DEVICE void round_to(Float16& to, float x) { to = __float2half_rn(x); }

namespace simt {

template <int kSize> INFSA_DEVICE void to_floats(const float (&x)[kSize], float* to) {
  for (int i = 0; i < kSize; ++i) to[i] = x[i];
}
template <int kSize> INFSA_DEVICE void to_floats(const Float16 (&x)[kSize], float* to) {
  for (int i = 0; i < kSize; ++i) to[i] = __half2float(x[i]);
}
// Two of a word: element by element, the compiler widens them as soon as they are loaded, and runs out of registers.
template <int kSize> INFSA_DEVICE void to_floats(const BFloat16 (&x)[kSize], float* to) {
  for (int i = 0; i < kSize; i += 2) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(x + i);
    to[i] = __uint_as_float(word << 16);
    to[i + 1] = __uint_as_float(word & 0xffff0000u);
  }
}

INFSA_DEVICE int thread() { return threadIdx.x; }
INFSA_DEVICE int block() { return blockIdx.x; }
INFSA_DEVICE void sync() { __syncthreads(); }
INFSA_DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
// What another block wrote before a barrier: not from this multiprocessor's own cache.
INFSA_DEVICE float load_written(const float* p) { return __ldcg(p); }

// The barrier of a cooperative launch, in whose workspace of the driver it counts: nothing to set to zero first.
struct GridBarrier {
  cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  cooperative_groups::grid_group::arrival_token token;
  INFSA_DEVICE void arrive() { token = grid.barrier_arrive(); }
  INFSA_DEVICE void wait() { grid.barrier_wait(std::move(token)); }
};

INFSA_DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#endif
}
// The same shared memory of another block of the cluster.
INFSA_DEVICE const float* of_block(float* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#else
  return shared;
#endif
}

}  // namespace simt
}  // namespace infsa::cuda
