// Groups of rows, in which Linear-InfSA's passes (linear_kernels.h) go over their tokens.
//
// Every pass is "one scalar per row, then something rank one": a row costs a dot product whose horizontal sum would
// dominate at d = 16. So rows go in groups of as many as a vector has lanes, reduced together to one vector of scalars.
// A group is that many consecutive tokens of one head (kOneHead: the head's vectors and sums stay in registers) or that
// many heads of one token, which walks a (B, N, H, d) tensor in the order of its memory.
#pragma once

#include "convert.h"
#include "linear.h"

namespace infsa::cpu::INFSA_ISA {
namespace linear {

// How the kernels are compiled: T the dtype in memory, kVecs the vectors per row (0: known at run time), kPacked
// through tiles of the accumulation type, which takes any d and any stride between channels.
template <typename T_, bool kOneHead_, int kVecs_, bool kPacked_> struct Variant {
  using T = T_;
  using A = Acc<T>;
  static constexpr bool kOneHead = kOneHead_, kPacked = kPacked_;
  static constexpr int kVecs = kVecs_;
};

// Rows of one group: vectors of T, `stride` elements apart.
template <typename T> struct Group {
  T* data;
  int64_t stride;
};

// The units of a group's rows: `stride` apart, 0 where they share a head.
template <typename A> struct RowUnits {
  const A* data;
  int64_t stride;

  INFSA_INLINE A operator[](int64_t r) const { return data ? data[r * stride] : A(1); }
};

// Copies rows that are no whole vectors (odd d, strided channels) or not in their units to a tile that is, ...
template <typename T> INFSA_INLINE void pack(Group<T> from, int64_t channel, int64_t rows, int64_t d,
                                             Group<Acc<T>> tile, RowUnits<Acc<T>> unit) {
  for (int64_t r = 0; r < rows; ++r)
    load_row(from.data + r * from.stride, channel, d, unit[r], tile.data + r * tile.stride);
}

// ... and back.
template <typename T> INFSA_INLINE void unpack(Group<Acc<T>> tile, int64_t rows, int64_t d, Group<T> to,
                                               int64_t channel, RowUnits<Acc<T>> unit) {
  for (int64_t r = 0; r < rows; ++r)
    store_row(to.data + r * to.stride, channel, d, unit[r], tile.data + r * tile.stride);
}

// Asks for the rows that come about kAhead bytes later in the walk over tokens. The hardware's prefetchers stop at each
// 4 KB page, and the arithmetic of one group fills the out-of-order window long before it reaches the next page by
// itself.
template <typename V> struct Prefetch {
  using T = typename V::T;
  static constexpr int64_t kAhead = 8 << 10, kLine = 64 / sizeof(T);
  int64_t size, offset;

  Prefetch(const Rows& rows, const LinearTask& task, int64_t d) : size(d) {
    const int64_t token_bytes = task.heads * d * int64_t(sizeof(T)) + 1;
    offset = (kAhead / token_bytes + 1) * rows.token;
  }

  INFSA_INLINE void operator()(Group<T> x, int64_t rows) const {
    if constexpr (!V::kPacked) {
      const int64_t n = V::kVecs ? V::kVecs * kLanes<Acc<T>> : size;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < n; c += kLine) __builtin_prefetch(x.data + r * x.stride + offset + c);
      }
    }
  }
};

// Lane r: row r . vector r, the vectors `vector_stride` apart (0: the same for all).
template <typename E, typename A>
INFSA_INLINE Vec<A> dots(Group<E> x, const A* vector, int64_t vector_stride, int64_t rows, int64_t vecs) {
  return sum_rows<A>([&](int r) INFSA_LAMBDA {
    Vec<A> sum{};
    if (r < rows) {
      for (int64_t c = 0; c < vecs; ++c)
        sum += load(x.data + r * x.stride + c * kLanes<A>) * load(vector + r * vector_stride + c * kLanes<A>);
    }
    return sum;
  });
}

// Lane r: ||row r||.
template <typename A, typename E> INFSA_INLINE Vec<A> norms(Group<E> x, int64_t rows, int64_t vecs) {
  return sqrt(sum_rows<A>([&](int r) INFSA_LAMBDA {
    Vec<A> sum{};
    if (r < rows) {
      for (int64_t c = 0; c < vecs; ++c) {
        const Vec<A> e = load(x.data + r * x.stride + c * kLanes<A>);
        sum += e * e;
      }
    }
    return sum;
  }));
}

// sums (of its head) += weight r * row r.
template <bool kOneHead, typename E, typename A>
INFSA_INLINE void add_weighted(A* sums, int64_t sums_stride, Group<E> x, Vec<A> weight, int64_t rows, int64_t vecs) {
  A w[kLanes<A>];
  store(w, weight);
  if constexpr (kOneHead) {
    for (int64_t c = 0; c < vecs; ++c) {
      // Four chains: one alone would wait for each addition before it.
      Vec<A> sum[4] = {load(sums + c * kLanes<A>)};
      for (int64_t r = 0; r < rows; ++r) sum[r % 4] += w[r] * load(x.data + r * x.stride + c * kLanes<A>);
      store(sums + c * kLanes<A>, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < vecs; ++c) {
        A* sum = sums + r * sums_stride + c * kLanes<A>;
        store(sum, load(sum) + w[r] * load(x.data + r * x.stride + c * kLanes<A>));
      }
    }
  }
}

// The same, and plain (of its head) += row r.
template <bool kOneHead, typename E, typename A>
INFSA_INLINE void add_weighted_and_plain(A* sums, A* plain, int64_t sums_stride, Group<E> x, Vec<A> weight,
                                         int64_t rows, int64_t vecs) {
  A w[kLanes<A>];
  store(w, weight);
  if constexpr (kOneHead) {
    for (int64_t c = 0; c < vecs; ++c) {
      Vec<A> sum[4] = {load(sums + c * kLanes<A>)}, all[4] = {load(plain + c * kLanes<A>)};
      for (int64_t r = 0; r < rows; ++r) {
        const Vec<A> e = load(x.data + r * x.stride + c * kLanes<A>);
        sum[r % 4] += w[r] * e;
        all[r % 4] += e;
      }
      store(sums + c * kLanes<A>, (sum[0] + sum[1]) + (sum[2] + sum[3]));
      store(plain + c * kLanes<A>, (all[0] + all[1]) + (all[2] + all[3]));
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < vecs; ++c) {
        const int64_t at = r * sums_stride + c * kLanes<A>;
        const Vec<A> e = load(x.data + r * x.stride + c * kLanes<A>);
        store(sums + at, load(sums + at) + w[r] * e);
        store(plain + at, load(plain + at) + e);
      }
    }
  }
}

// row r = weight r * vector r.
template <typename E, typename A> INFSA_INLINE void write_rank_one(Group<E> out, Vec<A> weight, const A* vector,
                                                                   int64_t vector_stride, int64_t rows, int64_t vecs) {
  A w[kLanes<A>];
  store(w, weight);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < vecs; ++c)
      store(out.data + r * out.stride + c * kLanes<A>, w[r] * load(vector + r * vector_stride + c * kLanes<A>));
  }
}

// body(n, h, rows) for each group of tokens [begin, end) and all heads of the task; `rows` a constant for whole groups.
template <bool kOneHead, int64_t kRows, typename Body>
INFSA_INLINE void for_groups(int64_t begin, int64_t end, int64_t heads, const Body& body) {
  for (int64_t n = begin; n < end; n += kOneHead ? kRows : 1) {
    for (int64_t h = 0; h < heads; h += kRows) {
      const int64_t rows = least(kRows, kOneHead ? end - n : heads - h);
      if (rows == kRows) {
        body(n, h, kRows);
      } else {
        body(n, h, rows);
      }
    }
  }
}

// Calls counted(begin, end) and ignored(begin, end) for the runs of tokens that the mask makes.
template <typename Counted, typename Ignored> INFSA_INLINE void for_runs(const Mask& mask, int64_t batch, int64_t begin,
                                                                         int64_t end, const Counted& counted,
                                                                         const Ignored& ignored) {
  if (!mask.data) return counted(begin, end);
  const bool* ignore = mask.data + batch * mask.batch;
  while (begin < end) {
    const bool skip = ignore[begin * mask.token];
    int64_t stop = begin + 1;
    while (stop < end && ignore[stop * mask.token] == skip) ++stop;
    if (skip) {
      ignored(begin, stop);
    } else {
      counted(begin, stop);
    }
    begin = stop;
  }
}

}  // namespace linear
}  // namespace infsa::cpu::INFSA_ISA
