// The vector type of one instruction set, with loads that convert to the accumulation type and stores that round back.
//
// Included by isa_<set>.cpp only. Everything lives in that set's namespace and nothing here may use a function of
// std::, since one compiled for AVX-512 must never be the copy that the linker keeps for a machine without it.
#pragma once

#include <stdint.h>

#include <type_traits>
#include <utility>

#include "../rows.h"

// 64 and 32 bytes mean AVX-512 and AVX2; 16 is portable. The intrinsics below stand where GCC 12 does not find the one
// instruction that the vector extensions spell in several.
#if INFSA_VEC_BYTES > 16
#include <immintrin.h>
// GCC 12's own AVX-512 header warns of its deliberately undefined pass-through operands (GCC bug 105593).
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#endif

namespace infsa::cpu::INFSA_ISA {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// Accumulation type: float32, or float64 for float64 input.
template <typename T> using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

typedef uint32_t VecU32 __attribute__((vector_size(INFSA_VEC_BYTES)));
typedef uint16_t HalfU16 __attribute__((vector_size(INFSA_VEC_BYTES / 2)));
typedef float HalfF32 __attribute__((vector_size(INFSA_VEC_BYTES / 2)));

template <typename A> struct VecOf {
  typedef A type __attribute__((vector_size(INFSA_VEC_BYTES)));
};
template <typename A> using Vec = typename VecOf<A>::type;
using VecF32 = Vec<float>;
using VecF64 = Vec<double>;
template <typename A> constexpr int kLanes = INFSA_VEC_BYTES / sizeof(A);

#define INFSA_LAMBDA __attribute__((always_inline))

template <typename To, typename From> INFSA_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename A> INFSA_INLINE Vec<A> broadcast(A x) { return x - Vec<A>{}; }

// ReLU that keeps NaN, as torch's does: the x86 maximum returns its second operand when either is NaN, so x stands
// second.
INFSA_INLINE VecF32 relu(VecF32 x) {
#if INFSA_VEC_BYTES == 64
  return bit_cast<VecF32>(_mm512_max_ps(_mm512_setzero_ps(), bit_cast<__m512>(x)));
#elif INFSA_VEC_BYTES == 32
  return bit_cast<VecF32>(_mm256_max_ps(_mm256_setzero_ps(), bit_cast<__m256>(x)));
#else
  return 0.0f > x ? VecF32{} : x;
#endif
}

INFSA_INLINE VecF64 relu(VecF64 x) { return 0.0 > x ? VecF64{} : x; }

// NaN stays NaN.
template <typename V> INFSA_INLINE V abs(V x) { return x < 0 ? -x : x; }

// -1, 0 or 1: a factor, so that a gradient that is NaN stays NaN where x is 0.
template <typename V> INFSA_INLINE V sign(V x) {
  const V one = V{} + 1;
  return x > 0 ? one : x < 0 ? -one : V{};
}

INFSA_INLINE VecF32 sqrt(VecF32 x) {
#if INFSA_VEC_BYTES == 64
  return bit_cast<VecF32>(_mm512_sqrt_ps(bit_cast<__m512>(x)));
#elif INFSA_VEC_BYTES == 32
  return bit_cast<VecF32>(_mm256_sqrt_ps(bit_cast<__m256>(x)));
#else
  for (int i = 0; i < kLanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

INFSA_INLINE VecF64 sqrt(VecF64 x) {
#if INFSA_VEC_BYTES == 64
  return bit_cast<VecF64>(_mm512_sqrt_pd(bit_cast<__m512d>(x)));
#elif INFSA_VEC_BYTES == 32
  return bit_cast<VecF64>(_mm256_sqrt_pd(bit_cast<__m256d>(x)));
#else
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}

INFSA_INLINE VecF32 load(const float* p) {
  VecF32 v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

INFSA_INLINE VecF64 load(const double* p) {
  VecF64 v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

INFSA_INLINE VecF32 load(const bf16* p) {
  HalfU16 half;
  __builtin_memcpy(&half, p, sizeof(half));
#if INFSA_VEC_BYTES == 64
  return bit_cast<VecF32>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bit_cast<__m256i>(half)), 16));
#elif INFSA_VEC_BYTES == 32
  return bit_cast<VecF32>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bit_cast<__m128i>(half)), 16));
#else
  return bit_cast<VecF32>(__builtin_convertvector(half, VecU32) << 16);
#endif
}

INFSA_INLINE VecF32 load(const fp16* p) {
  HalfU16 half;
  __builtin_memcpy(&half, p, sizeof(half));
#if INFSA_VEC_BYTES == 64
  return bit_cast<VecF32>(_mm512_cvtph_ps(bit_cast<__m256i>(half)));
#elif INFSA_VEC_BYTES == 32
  return bit_cast<VecF32>(_mm256_cvtph_ps(bit_cast<__m128i>(half)));
#else
  // Exponent and mantissa shifted into place are 2^-112 too small, subnormals included; Inf and NaN need their exponent
  // back.
  const VecU32 bits = __builtin_convertvector(half, VecU32);
  const VecU32 magnitude = bits & 0x7fff;
  VecU32 f = bit_cast<VecU32>(bit_cast<VecF32>(magnitude << 13) * 0x1p112f);
  f = magnitude >= 0x7c00 ? f | 0x7f800000u : f;
  return bit_cast<VecF32>(f | ((bits & 0x8000) << 16));
#endif
}

INFSA_INLINE void store(float* p, VecF32 v) { __builtin_memcpy(p, &v, sizeof(v)); }

INFSA_INLINE void store(double* p, VecF64 v) { __builtin_memcpy(p, &v, sizeof(v)); }

INFSA_INLINE void store(bf16* p, VecF32 v) {
  const VecU32 bits = bit_cast<VecU32>(v);
  const VecU32 nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const VecU32 rounded = v == v ? nearest_even : VecU32{} + 0x7fc0;
#if INFSA_VEC_BYTES == 64
  const __m256i half = _mm512_cvtepi32_epi16(bit_cast<__m512i>(rounded));
#else
  const HalfU16 half = __builtin_convertvector(rounded, HalfU16);
#endif
  __builtin_memcpy(p, &half, sizeof(half));
}

INFSA_INLINE void store(fp16* p, VecF32 v) {
#if INFSA_VEC_BYTES == 64
  const __m256i half = _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
#elif INFSA_VEC_BYTES == 32
  const __m128i half = _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
#else
  const VecU32 bits = bit_cast<VecU32>(v);
  const VecU32 sign = (bits >> 16) & 0x8000;
  const VecU32 magnitude = bits & 0x7fffffff;
  const VecU32 normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // Adding 1/2 leaves the subnormal's bits, rounded by the addition itself, at the bottom of the mantissa.
  const VecU32 subnormal = bit_cast<VecU32>(bit_cast<VecF32>(magnitude) + 0.5f) - 0x3f000000u;
  VecU32 h = magnitude < (113u << 23) ? subnormal : normal;
  h = magnitude >= 0x477ff000u ? VecU32{} + 0x7c00 : h;
  h = magnitude > 0x7f800000u ? VecU32{} + 0x7e00 : h;
  const HalfU16 half = __builtin_convertvector(h | sign, HalfU16);
#endif
  __builtin_memcpy(p, &half, sizeof(half));
}

// The first n lanes (n < lanes); the others read as 0 and are not written.
template <typename T> INFSA_INLINE Vec<Acc<T>> load_first(const T* p, int64_t n) {
  T lanes[kLanes<Acc<T>>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <typename T> INFSA_INLINE void store_first(T* p, Vec<Acc<T>> v, int64_t n) {
  T lanes[kLanes<Acc<T>>];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

// The first n lanes, 0 elsewhere; n may be more than there are.
template <typename A> INFSA_INLINE Vec<A> keep_first(Vec<A> v, int64_t n) {
  Vec<A> lane;
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = A(i);
  return lane < A(n) ? v : Vec<A>{};
}

// x's sums of neighbours, then y's. A neighbour is one lane within each 16 bytes (a shuffle that stays in its 128-bit
// lane), or 16 bytes within the whole vector.
template <bool kWithin16Bytes, typename V, int... i>
INFSA_INLINE V pair_sums(V x, V y, std::integer_sequence<int, i...>) {
  constexpr int lanes = sizeof...(i), lanes16 = 16 * lanes / int(sizeof(V));
  constexpr int span = kWithin16Bytes ? lanes16 : lanes, unit = kWithin16Bytes ? 1 : lanes16, half = span / unit / 2;
  return __builtin_shufflevector(
             x, y,
             (i % span / unit / half * lanes + i / span * span + i % span / unit % half * 2 * unit + i % unit)...) +
         __builtin_shufflevector(x, y,
                                 (i % span / unit / half * lanes + i / span * span +
                                  (i % span / unit % half * 2 + 1) * unit + i % unit)...);
}

// Lane i of the result is the sum of the lanes of row(i): one vector of sums for the price of lanes - 1 pair sums.
template <typename A, int kFirst = 0, int kRows = kLanes<A>, typename Row>
INFSA_INLINE Vec<A> sum_rows(const Row& row) {
  if constexpr (kRows == 1) {
    return row(kFirst);
  } else {
    return pair_sums<(kRows <= 16 / int(sizeof(A)))>(sum_rows<A, kFirst, kRows / 2>(row),
                                                     sum_rows<A, kFirst + kRows / 2, kRows / 2>(row),
                                                     std::make_integer_sequence<int, kLanes<A>>());
  }
}

// Lane by lane from the first: for the end of a loop. Sums of many vectors at once have better ways.
template <typename V> INFSA_INLINE auto sum_lanes(V v) {
  auto sum = v[0];
  for (int i = 1; i < int(sizeof(v) / sizeof(v[0])); ++i) sum += v[i];
  return sum;
}

}  // namespace infsa::cpu::INFSA_ISA
