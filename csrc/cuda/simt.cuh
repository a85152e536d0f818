// The few primitives of a GPU that the kernels use. tests/gpu/simt has the same ones for the host.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#define INFSA_DEVICE __device__ __forceinline__

namespace infsa::cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

INFSA_DEVICE void round_to(float& to, float x) { to = x; }
INFSA_DEVICE void round_to(BFloat16& to, float x) { to = __float2bfloat16_rn(x); }
INFSA_DEVICE void round_to(Float16& to, float x) { to = __float2half_rn(x); }

namespace simt {

// Elements as words in memory hold them: 1 of float32, 2 of the others.
template <typename T, int kWords> INFSA_DEVICE void to_floats(const uint32_t (&words)[kWords], float* to) {
  for (int i = 0; i < kWords; ++i) {
    if constexpr (sizeof(T) == 4) {
      to[i] = __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      to[2 * i] = __uint_as_float(words[i] << 16), to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    } else {
      to[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i])));
      to[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] >> 16)));
    }
  }
}
template <typename T, int kWords> INFSA_DEVICE void from_floats(const float* x, uint32_t (&words)[kWords]) {
  for (int i = 0; i < kWords; ++i) {
    if constexpr (sizeof(T) == 4) {
      words[i] = __float_as_uint(x[i]);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
      words[i] = reinterpret_cast<const uint32_t&>(pair);
    } else {
      const __half2 pair = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
      words[i] = reinterpret_cast<const uint32_t&>(pair);
    }
  }
}

// A number that stays in its registers: the compiler would rather compute it anew in every turn of a loop.
INFSA_DEVICE int64_t computed(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}

// 1 / sqrt(x) within 2^-22.9, in one instruction. Of less than the least normal number it is infinite.
INFSA_DEVICE float rough_inverse_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
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
