// Rows of any dtype and stride as rows of whole vectors of the accumulation type, and back.
//
// Included by isa_<set>.cpp only, like vec.h.
#pragma once

#include "tokens.h"
#include "vec.h"

namespace infsa::cpu::INFSA_ISA {

template <typename A> INFSA_INLINE int64_t row_length(int64_t columns) { return round_up(columns, kLanes<A>); }

// Parts of one piece of memory, on cache lines of their own; of no memory, how large it has to be.
struct Arena {
  explicit Arena(void* memory) : base(reinterpret_cast<uintptr_t>(memory)) {}
  template <typename A> A* take(int64_t n) {
    A* part = reinterpret_cast<A*>(base + bytes);
    bytes += round_up(n * int64_t(sizeof(A)), 64);
    return part;
  }
  const uintptr_t base;
  int64_t bytes = 0;
};

// One row times scale, 0 behind its end ...
template <typename T>
INFSA_INLINE void load_row(const T* row, int64_t channel, int64_t columns, Acc<T> scale, Acc<T>* to) {
  constexpr int64_t lanes = kLanes<Acc<T>>;
  int64_t c = 0;
  if (channel == 1) {
    for (; c + lanes <= columns; c += lanes) store(to + c, load(row + c) * scale);
  }
  for (; c < columns; c += lanes) {
    T some[lanes] = {};
    for (int64_t i = 0; i < least(lanes, columns - c); ++i) some[i] = row[(c + i) * channel];
    store(to + c, load(some) * scale);
  }
}

// ... and back, rounded.
template <typename T>
INFSA_INLINE void store_row(T* row, int64_t channel, int64_t columns, Acc<T> scale, const Acc<T>* from) {
  constexpr int64_t lanes = kLanes<Acc<T>>;
  int64_t c = 0;
  if (channel == 1) {
    for (; c + lanes <= columns; c += lanes) store(row + c, load(from + c) * scale);
  }
  for (; c < columns; c += lanes) {
    T some[lanes];
    store(some, load(from + c) * scale);
    for (int64_t i = 0; i < least(lanes, columns - c); ++i) row[(c + i) * channel] = some[i];
  }
}

template <typename T> INFSA_INLINE T* row_of(const Tokens& t, int64_t i) {
  return static_cast<T*>(t.data) + (t.kept ? t.kept[i] : i) * t.token;
}

// Tokens [begin, begin + count) as rows of the accumulation type, `stride` apart.
template <typename T> void load_rows(const Tokens& from, int64_t begin, int64_t count, int64_t columns, Acc<T> scale,
                                     Acc<T>* to, int64_t stride) {
  for (int64_t r = 0; r < count; ++r)
    load_row(row_of<T>(from, begin + r), from.channel, columns, scale, to + r * stride);
}

// The same by columns, `stride` apart; 0 behind their ends up to a whole vector.
template <typename T> void load_columns(const Tokens& from, int64_t begin, int64_t count, int64_t columns, Acc<T> scale,
                                        Acc<T>* to, int64_t stride) {
  constexpr int64_t lanes = kLanes<Acc<T>>;
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < count; r += lanes) {
      T some[lanes] = {};
      for (int64_t i = 0; i < least(lanes, count - r); ++i) some[i] = row_of<T>(from, begin + r + i)[c * from.channel];
      store(to + c * stride + r, load(some) * scale);
    }
  }
}

template <typename T> void store_rows(const Tokens& to, int64_t begin, int64_t count, int64_t columns, Acc<T> scale,
                                      const Acc<T>* from, int64_t stride) {
  for (int64_t r = 0; r < count; ++r)
    store_row(row_of<T>(to, begin + r), to.channel, columns, scale, from + r * stride);
}

// The largest |x|; NaN where one is.
template <typename A> double largest_of(const A* x, int64_t n) {
  Vec<A> most = {};
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    const Vec<A> e = n - i < kLanes<A> ? load_first(x + i, n - i) : load(x + i), size = e < A(0) ? -e : e;
    most = size <= most ? most : size + most * A(0);
  }
  A result = 0;
  for (int l = 0; l < kLanes<A>; ++l) result = most[l] <= result ? result : most[l] + result * A(0);
  return result;
}

// The products are exact in float64: two float32 factors have 48 bits.
template <typename A> double dot_of(const A* x, const A* y, int64_t n) {
  double sum[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int l = 0; l < 8; ++l) sum[l] += double(x[i + l]) * double(y[i + l]);
  }
  for (; i < n; ++i) sum[0] += double(x[i]) * double(y[i]);
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

// Columns that are converted at a time, on the stack.
constexpr int64_t kColumns = 512;

template <typename T> Tokens from_column(const Tokens& t, int64_t c) {
  return {static_cast<T*>(t.data) + c * t.channel, t.token, t.channel, t.kept};
}

template <typename T> double largest(const Tokens& x, int64_t columns, Range range) {
  using A = Acc<T>;
  A part[kColumns];
  double most = 0;
  for (int64_t r = range.begin; r < range.end; ++r) {
    for (int64_t c = 0; c < columns; c += kColumns) {
      const int64_t n = least(columns - c, kColumns);
      load_rows<T>(from_column<T>(x, c), r, 1, n, A(1), part, kColumns);
      const double size = largest_of(part, row_length<A>(n));
      if (!(size <= most)) most = size;
      if (most != most) return most;
    }
  }
  return most;
}

// <x, y>; without y, <x, sums>.
template <typename T>
double dot(const Tokens& x, const Tokens& y, const void* sums, int64_t stride, int64_t columns, Range range) {
  using A = Acc<T>;
  A left[kColumns], right[kColumns];
  double total = 0;
  for (int64_t c = 0; c < columns; c += kColumns) {
    const int64_t n = least(columns - c, kColumns);
    for (int64_t r = range.begin; r < range.end; ++r) {
      load_rows<T>(from_column<T>(x, c), r, 1, n, A(1), left, n);
      if (y.data) load_rows<T>(from_column<T>(y, c), r, 1, n, A(1), right, n);
      total += dot_of(left, y.data ? right : static_cast<const A*>(sums) + r * stride + c, n);
    }
  }
  return total;
}

template <typename T> constexpr TokenKernels token_kernels() {
  using A = Acc<T>;
  return {
      [](const Tokens& to, const void* sums, int64_t stride, int64_t columns, double scale, Range range) {
        store_rows<T>(to, range.begin, range.size(), columns, A(scale),
                      static_cast<const A*>(sums) + range.begin * stride, stride);
      },
      largest<T>,
      [](const void* sums, int64_t stride, Range range) {
        return largest_of(static_cast<const A*>(sums) + range.begin * stride, range.size() * stride);
      },
      dot<T>,
  };
}

}  // namespace infsa::cpu::INFSA_ISA
