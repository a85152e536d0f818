// Matrix products: one register tile, C[rows x vectors] = A (broadcast) B (rows of vectors), and the panels that its
// operands are packed in.
//
// Included by isa_<set>.cpp only, like vec.h.
#pragma once

#include "pairs.h"

namespace infsa::cpu::INFSA_ISA {

// Rows x 2 vectors of accumulators, plus 2 of B and a broadcast: 27 of AVX-512's 32 registers, 15 of AVX2's 16.
#if INFSA_VEC_BYTES == 64
constexpr int kTileRows = 12;
#elif INFSA_VEC_BYTES == 32
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileVectors = 2;
template <typename A> constexpr int64_t kPanel = kTileVectors * kLanes<A>;

// done(c) with c[i] = sum_l a[i * a_row + l * a_depth] b[l * b_depth ...]: the one loop where the time goes. Of
// numbers, or of pairs of them.
template <int kVectors, typename E, typename Done> INFSA_INLINE void tile(const E* a, int64_t a_row, int64_t a_depth,
                                                                          const E* b, int64_t b_depth, int64_t depth,
                                                                          Done&& done) {
  Vec<SumOf<E>> c[kTileRows][kVectors] = {};
  for (int64_t l = 0; l < depth; ++l) {
    Vec<E> right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + v * kLanes<E>);
#pragma GCC unroll 12
    for (int i = 0; i < kTileRows; ++i) {
      const Vec<E> left = broadcast(a[i * a_row]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) c[i][v] = multiply_add(c[i][v], left, right[v]);
    }
    a += a_depth;
    b += b_depth;
  }
  done(c);
}

// C += A B over whole vectors of columns. A block's sum starts from 0 and is added once, which keeps the rounding of a
// sum over many blocks near that of one block. A may be read past `rows` up to a whole tile; C is not.
template <int kVectors, typename E> INFSA_INLINE void add_columns(int64_t rows, int64_t depth, const E* a,
                                                                  int64_t a_row, int64_t a_depth, const E* b,
                                                                  int64_t b_row, SumOf<E>* c, int64_t c_row) {
  for (int64_t r = 0; r < rows; r += kTileRows) {
    SumOf<E>* to = c + r * c_row;
    const int64_t count = least(rows - r, kTileRows);
    for (int64_t i = 0; i < count; ++i) __builtin_prefetch(to + i * c_row, 1);
    tile<kVectors>(a + r * a_row, a_row, a_depth, b, b_row, depth, [&](auto& sum) INFSA_LAMBDA {
#pragma GCC unroll 12
      for (int i = 0; i < kTileRows; ++i) {
        if (i >= count) break;
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          SumOf<E>* at = to + i * c_row + v * kLanes<E>;
          store(at, load(at) + sum[i][v]);
        }
      }
    });
  }
}

template <typename E> INFSA_INLINE void add_product(int64_t rows, int64_t columns, int64_t depth, const E* a,
                                                    int64_t a_row, int64_t a_depth, const E* b, int64_t b_row,
                                                    SumOf<E>* c, int64_t c_row) {
  int64_t j = 0;
  for (; j + kPanel<E> <= columns; j += kPanel<E>)
    add_columns<kTileVectors>(rows, depth, a, a_row, a_depth, b + j, b_row, c + j, c_row);
  if (j < columns) add_columns<1>(rows, depth, a, a_row, a_depth, b + j, b_row, c + j, c_row);
}

// {a0 b0 a1 b1 ...}: the first half of it, or the second.
template <bool kSecond, typename V, int... i> INFSA_INLINE V interleave(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int lanes = sizeof...(i);
  return __builtin_shufflevector(a, b, ((kSecond ? lanes / 2 : 0) + i / 2 + i % 2 * lanes)...);
}

// The rows as columns, times scale, which is 1 for pairs: panels of kPanel rows, each (columns x kPanel), `panel_size`
// elements apart. Missing rows are 0.
template <typename A> void make_panels(const A* rows, int64_t stride, int64_t count, int64_t columns, A scale,
                                       A* panels, int64_t panel_size) {
  constexpr int lanes = kLanes<A>;
  constexpr std::make_integer_sequence<int, lanes> all;
  for (int64_t r = 0; r < count; r += lanes) {
    A* panel = panels + r / kPanel<A> * panel_size + r % kPanel<A>;
    for (int64_t c = 0; c < columns; c += lanes) {
      Vec<A> m[lanes], next[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) m[i] = r + i < count ? load(rows + (r + i) * stride + c) * scale : Vec<A>{};
      // Each round turns the top bit of the row number into the lowest bit of the column number, and back.
#pragma GCC unroll 4
      for (int step = 1; step < lanes; step *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < lanes / 2; ++i) {
          next[2 * i] = interleave<false>(m[i], m[i + lanes / 2], all);
          next[2 * i + 1] = interleave<true>(m[i], m[i + lanes / 2], all);
        }
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) m[i] = next[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        if (c + i < columns) store(panel + (c + i) * kPanel<A>, m[i]);
      }
    }
  }
}

}  // namespace infsa::cpu::INFSA_ISA
