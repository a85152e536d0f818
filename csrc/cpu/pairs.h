// Products of bfloat16 in pairs: what AVX512-BF16 and ARM's BF16 multiply two of at once, with sums in float32.
//
// Included by isa_<set>.cpp only, like vec.h. Sets that have the instruction define INFSA_BF16_PRODUCTS.
#pragma once

#include "vec.h"

#if defined(INFSA_BF16_PRODUCTS) && defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace infsa::cpu::INFSA_ISA {

// Two neighbours along the depth of a product, the first in the low half.
using Pair = uint32_t;

INFSA_INLINE VecU32 load(const Pair* p) {
  VecU32 v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

INFSA_INLINE void store(Pair* p, VecU32 v) { __builtin_memcpy(p, &v, sizeof(v)); }

// What sums of products of E are made in.
template <typename E> using SumOf = std::conditional_t<std::is_same_v<E, Pair>, float, E>;

INFSA_INLINE VecF32 multiply_add(VecF32 sum, VecF32 a, VecF32 b) { return sum + a * b; }
INFSA_INLINE VecF64 multiply_add(VecF64 sum, VecF64 a, VecF64 b) { return sum + a * b; }

#if defined(INFSA_BF16_PRODUCTS)

// Subnormals count as 0 in all of these on x86: callers bring numbers to order one (range.h).
#if defined(__x86_64__)

INFSA_INLINE VecF32 multiply_add(VecF32 sum, VecU32 a, VecU32 b) {
  return bit_cast<VecF32>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
}

// Rounded: the lanes of first, then those of second.
INFSA_INLINE VecU32 join(VecF32 first, VecF32 second) {
  return bit_cast<VecU32>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(second), bit_cast<__m512>(first)));
}

#else

INFSA_INLINE VecF32 multiply_add(VecF32 sum, VecU32 a, VecU32 b) {
  return bit_cast<VecF32>(
      vbfdotq_f32(bit_cast<float32x4_t>(sum), bit_cast<bfloat16x8_t>(a), bit_cast<bfloat16x8_t>(b)));
}

INFSA_INLINE VecU32 join(VecF32 first, VecF32 second) {
  const bfloat16x8_t low = vcvtq_low_bf16_f32(bit_cast<float32x4_t>(first));
  return bit_cast<VecU32>(vcvtq_high_bf16_f32(low, bit_cast<float32x4_t>(second)));
}

#endif

// Rounded: lane i is a pair of their lanes i.
template <int... i> INFSA_INLINE VecU32 zip(VecF32 first, VecF32 second, std::integer_sequence<int, i...>) {
  typedef uint16_t Halves __attribute__((vector_size(INFSA_VEC_BYTES)));
  const Halves joined = bit_cast<Halves>(join(first, second));
  return bit_cast<VecU32>(__builtin_shufflevector(joined, joined, (i / 2 + i % 2 * int(sizeof...(i)) / 2)...));
}
INFSA_INLINE VecU32 zip(VecF32 first, VecF32 second) {
  return zip(first, second, std::make_integer_sequence<int, INFSA_VEC_BYTES / 2>());
}

#endif

}  // namespace infsa::cpu::INFSA_ISA
