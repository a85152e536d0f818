// Matrix products: one register tile, C[rows x vectors] = A (broadcast) B (rows of vectors), and the packing that its
// operands need.
//
// Included by isa_<set>.cpp only, like vec.h.
#pragma once

#include "tokens.h"
#include "vec.h"

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

#define INFSA_LAMBDA __attribute__((always_inline))

INFSA_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
INFSA_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename A> INFSA_INLINE int64_t row_length(int64_t columns) { return round_up(columns, kLanes<A>); }

// done(c) with c[i] = sum_l a[i * a_row + l * a_depth] b[l * b_depth ...]: the one loop where the time goes.
template <int kVectors, typename A, typename Done> INFSA_INLINE void tile(const A* a, int64_t a_row, int64_t a_depth,
                                                                          const A* b, int64_t b_depth, int64_t depth,
                                                                          Done&& done) {
  Vec<A> c[kTileRows][kVectors] = {};
  for (int64_t l = 0; l < depth; ++l) {
    Vec<A> right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + v * kLanes<A>);
#pragma GCC unroll 12
    for (int i = 0; i < kTileRows; ++i) {
      const Vec<A> left = broadcast(a[i * a_row]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) c[i][v] += left * right[v];
    }
    a += a_depth;
    b += b_depth;
  }
  done(c);
}

// C += A B over whole vectors of columns. A block's sum starts from 0 and is added once, which keeps the rounding of a
// sum over many blocks near that of one block. A may be read past `rows` up to a whole tile; C is not.
template <int kVectors, typename A> INFSA_INLINE void add_columns(int64_t rows, int64_t depth, const A* a,
                                                                  int64_t a_row, int64_t a_depth, const A* b,
                                                                  int64_t b_row, A* c, int64_t c_row) {
  for (int64_t r = 0; r < rows; r += kTileRows) {
    A* to = c + r * c_row;
    const int64_t count = least(rows - r, kTileRows);
    for (int64_t i = 0; i < count; ++i) __builtin_prefetch(to + i * c_row, 1);
    tile<kVectors>(a + r * a_row, a_row, a_depth, b, b_row, depth, [&](auto& sum) INFSA_LAMBDA {
#pragma GCC unroll 12
      for (int i = 0; i < kTileRows; ++i) {
        if (i >= count) break;
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          A* at = to + i * c_row + v * kLanes<A>;
          store(at, load(at) + sum[i][v]);
        }
      }
    });
  }
}

template <typename A> INFSA_INLINE void add_product(int64_t rows, int64_t columns, int64_t depth, const A* a,
                                                    int64_t a_row, int64_t a_depth, const A* b, int64_t b_row, A* c,
                                                    int64_t c_row) {
  int64_t j = 0;
  for (; j + kPanel<A> <= columns; j += kPanel<A>)
    add_columns<kTileVectors>(rows, depth, a, a_row, a_depth, b + j, b_row, c + j, c_row);
  if (j < columns) add_columns<1>(rows, depth, a, a_row, a_depth, b + j, b_row, c + j, c_row);
}

// Tokens [begin, begin + rows) as rows of the accumulation type, `stride` apart, times scale; columns padded with 0.
template <typename T> void copy_rows(const Tokens& from, int64_t begin, int64_t rows, int64_t columns, Acc<T> scale,
                                     Acc<T>* to, int64_t stride) {
  constexpr int64_t lanes = kLanes<Acc<T>>;
  for (int64_t r = 0; r < rows; ++r, to += stride) {
    const int64_t token = from.kept ? from.kept[begin + r] : begin + r;
    const T* row = static_cast<const T*>(from.data) + token * from.row;
    int64_t c = 0;
    if (from.col == 1) {
      for (; c + lanes <= columns; c += lanes) store(to + c, load(row + c) * scale);
    }
    for (; c < columns; c += lanes) {
      T some[lanes] = {};
      for (int64_t i = 0; i < least(lanes, columns - c); ++i) some[i] = row[(c + i) * from.col];
      store(to + c, load(some) * scale);
    }
  }
}

// The way back: rows of the accumulation type, `stride` apart, times scale, rounded, to tokens [begin, begin + rows).
template <typename T> void store_rows(const Tokens& to, int64_t begin, int64_t rows, int64_t columns, Acc<T> scale,
                                      const Acc<T>* from, int64_t stride) {
  constexpr int64_t lanes = kLanes<Acc<T>>;
  for (int64_t r = 0; r < rows; ++r, from += stride) {
    T* row = static_cast<T*>(to.data) + (to.kept ? to.kept[begin + r] : begin + r) * to.row;
    int64_t c = 0;
    if (to.col == 1) {
      for (; c + lanes <= columns; c += lanes) store(row + c, load(from + c) * scale);
    }
    for (; c < columns; c += lanes) {
      T some[lanes];
      store(some, load(from + c) * scale);
      for (int64_t i = 0; i < least(lanes, columns - c); ++i) row[(c + i) * to.col] = some[i];
    }
  }
}

// {a0 b0 a1 b1 ...}: the first half of it, and the second.
template <typename V> INFSA_INLINE V interleave_low(V a, V b) {
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  if constexpr (lanes == 16) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  } else if constexpr (lanes == 8) {
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  } else if constexpr (lanes == 4) {
    return __builtin_shufflevector(a, b, 0, 4, 1, 5);
  } else {
    return __builtin_shufflevector(a, b, 0, 2);
  }
}

template <typename V> INFSA_INLINE V interleave_high(V a, V b) {
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  if constexpr (lanes == 16) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  } else if constexpr (lanes == 8) {
    return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else if constexpr (lanes == 4) {
    return __builtin_shufflevector(a, b, 2, 6, 3, 7);
  } else {
    return __builtin_shufflevector(a, b, 1, 3);
  }
}

// The rows as columns, times scale: panels of kPanel rows, each (columns x kPanel), `panel_size` elements apart.
// Missing rows are 0.
template <typename A> void make_panels(const A* rows, int64_t stride, int64_t count, int64_t columns, A scale,
                                       A* panels, int64_t panel_size) {
  constexpr int lanes = kLanes<A>;
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
          next[2 * i] = interleave_low(m[i], m[i + lanes / 2]);
          next[2 * i + 1] = interleave_high(m[i], m[i + lanes / 2]);
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
