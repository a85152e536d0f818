// A block of an image's tokens: loaded, normalised and multiplied by packed matrices. The pooled layer's two operators
// (central_query_kernels.h, score_pool_kernels.h) reduce it while the results are still in cache.
//
// Included by isa_<set>.cpp only.
#pragma once

#include "convert.h"
#include "gemm.h"
#include "image.h"

namespace infsa::cpu::INFSA_ISA {

// A block of tokens takes about this much of a core's L2.
constexpr int64_t kTokenBytes = 400 << 10;
// Products are summed over so many terms at a time: a panel's part stays in L1 while the rows of a block go by, and
// long sums round as sums of short ones.
constexpr int64_t kDepth = 256;

template <typename A> int64_t token_block(int64_t D) {
  const int64_t fit = kTokenBytes / (int64_t(sizeof(A)) * (D + 1)) / 12 * 12;
  return fit < 24 ? 24 : least(fit, 192);
}

// Rows of a block lie one vector more than they need apart: not a multiple of 4 KB, of which L1 holds few.
template <typename A> int64_t row_stride(int64_t columns) { return round_up(columns, kPanel<A>) + kLanes<A>; }

// Rows that may be read: a tile, or a vector of tokens, beyond the block.
template <typename A> int64_t padded_rows(int64_t rows) { return round_up(rows, 12) + kLanes<A>; }

// sum of f(c) over vectors of columns
template <typename A, typename F> INFSA_INLINE A sum_columns(int64_t columns, F&& f) {
  constexpr int64_t lanes = kLanes<A>;
  Vec<A> sum[4] = {};
  int64_t c = 0;
  for (; c + 4 * lanes <= columns; c += 4 * lanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[i] += f(c + i * lanes);
  }
  for (; c < columns; c += lanes) sum[0] += keep_first<A>(f(c), columns - c);
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// C = A B^T for packed panels of B.
template <typename A> void multiply(int64_t rows, int64_t depth, const A* a, int64_t a_row, const A* panels,
                                    int64_t columns, A* c, int64_t c_row) {
  for (int64_t j = 0; j < columns; j += kPanel<A>) {
    const int64_t width = least(round_up(columns - j, kLanes<A>), kPanel<A>);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t v = 0; v < width; v += kLanes<A>) store(c + r * c_row + j + v, Vec<A>{});
    }
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t count = least(depth - k, kDepth);
      const A* b = panels + j * depth + k * kPanel<A>;
      if (width > kLanes<A>) {
        add_columns<kTileVectors>(rows, count, a + k, a_row, 1, b, kPanel<A>, c + j, c_row);
      } else {
        add_columns<1>(rows, count, a + k, a_row, 1, b, kPanel<A>, c + j, c_row);
      }
    }
  }
}

template <typename T>
void pack(const Tokens& from, int64_t rows, int64_t columns, Range range, void* panels, void* packed_columns) {
  using A = Acc<T>;
  constexpr int64_t kAtOnce = 4 * kPanel<A>;  // columns
  A part[kPanel<A> * kAtOnce];
  for (int64_t p = range.begin; p < range.end; ++p) {
    const int64_t first = p * kPanel<A>, count = least(rows - first, kPanel<A>);
    for (int64_t c = 0; c < columns; c += kAtOnce) {
      const int64_t width = least(columns - c, kAtOnce);
      load_rows<T>(from_column<T>(from, c), first, count, width, A(1), part, kAtOnce);
      // make_panels leaves out the second vector of a panel that has rows for one only.
      A* panel = static_cast<A*>(panels) + (first * columns + c * kPanel<A>);
      make_panels(part, kAtOnce, count, width, A(1), panel, 0);
      if (!packed_columns) continue;
      for (int64_t j = 0; j < width; j += kPanel<A>) {
        A* to = static_cast<A*>(packed_columns) + (c + j) * rows + first * kPanel<A>;
        for (int64_t r = 0; r < count; ++r) {
          for (int64_t v = 0; v < least(round_up(width - j, kLanes<A>), kPanel<A>); v += kLanes<A>)
            store(to + r * kPanel<A> + v, load(part + r * kAtOnce + j + v));
        }
      }
    }
  }
}

// One block of tokens in the accumulation type.
template <typename T> struct Block {
  using A = Acc<T>;
  const int64_t stride;
  A *rows, *inverse;  // x^ (tokens, D), and 1 / sqrt(var + eps)

  Block(const Image& t, Arena& arena)
      : stride(row_stride<A>(t.D)),
        rows(arena.take<A>(padded_rows<A>(token_block<A>(t.D)) * stride)),
        inverse(arena.take<A>(token_block<A>(t.D))) {}

  void load_tokens(const Image& t, int64_t begin, int64_t count) {
    load_rows<T>(t.x, begin, count, t.D, A(1), rows, stride);
    if (!t.norm) return;
    for (int64_t r = 0; r < count; ++r) {
      A* x = rows + r * stride;
      const A mean = sum_columns<A>(t.D, [&](int64_t c) INFSA_LAMBDA { return load(x + c); }) / A(t.D);
      // What rounding left of the mean shows in the sum of the differences: beside a large mean it would count.
      const A rest = sum_columns<A>(t.D, [&](int64_t c) INFSA_LAMBDA { return load(x + c) - mean; }) / A(t.D);
      const auto centered = [&](int64_t c) INFSA_LAMBDA { return (load(x + c) - mean) - rest; };
      const A square = sum_columns<A>(t.D, [&](int64_t c) INFSA_LAMBDA { return centered(c) * centered(c); });
      inverse[r] = A(1 / __builtin_sqrt(double(square) / double(t.D) + t.norm_eps));
      for (int64_t c = 0; c < t.D; c += kLanes<A>) store(x + c, keep_first<A>(centered(c) * inverse[r], t.D - c));
    }
  }

  // From dx^ to dx, in place, and out.
  void store_gradient(const Image& t, int64_t begin, int64_t count, A* gradient) const {
    for (int64_t r = 0; r < count && t.norm; ++r) {
      const A* x = rows + r * stride;
      A* g = gradient + r * stride;
      const A mean = sum_columns<A>(t.D, [&](int64_t c) INFSA_LAMBDA { return load(g + c); }) / A(t.D);
      const A along = sum_columns<A>(t.D, [&](int64_t c) INFSA_LAMBDA { return load(g + c) * load(x + c); }) / A(t.D);
      for (int64_t c = 0; c < t.D; c += kLanes<A>)
        store(g + c, (load(g + c) - mean - along * load(x + c)) * inverse[r]);
    }
    store_rows<T>(t.dx, begin, count, t.D, A(1), gradient, stride);
  }
};

template <typename T> constexpr ImageKernels image_kernels() { return {token_block<Acc<T>>, pack<T>, pack<Acc<T>>}; }

}  // namespace infsa::cpu::INFSA_ISA
