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

// How the kernels are compiled: T the dtype in memory, kVecs the vectors per row where rows of a group lie one behind
// another (0: known at run time, rows anywhere), kPacked through tiles of the accumulation type, which takes any d and
// any stride between channels.
template <typename T_, bool kOneHead_, int kVecs_, bool kPacked_> struct Variant {
  using T = T_;
  using A = Acc<T>;
  static constexpr bool kOneHead = kOneHead_, kPacked = kPacked_;
  static constexpr int kVecs = kVecs_;
  // Tokens that the forward takes at once where they are in cache: the sums of a group of heads are loaded and stored
  // once for all of them. From memory the order of one token after the other is faster, and the backward, which writes
  // two rows for each, gains nothing.
  static constexpr int64_t kTokens = kOneHead || kPacked ? 1 : 4;
};

// Rows of one group: vectors of T, a constant number of elements apart where kStride is not 0, so that the compiler
// needs one address for all of them.
template <typename T, int kStride = 0> struct Group {
  T* data;
  int64_t stride;

  INFSA_INLINE T* row(int64_t r) const { return data + r * (kStride ? kStride : stride); }
  // The same rows so many elements further on.
  INFSA_INLINE Group after(int64_t elements) const { return {data + elements, stride}; }
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
  for (int64_t r = 0; r < rows; ++r) load_row(from.row(r), channel, d, unit[r], tile.row(r));
}

// ... and back.
template <typename T> INFSA_INLINE void unpack(Group<Acc<T>> tile, int64_t rows, int64_t d, Group<T> to,
                                               int64_t channel, RowUnits<Acc<T>> unit) {
  for (int64_t r = 0; r < rows; ++r) store_row(to.row(r), channel, d, unit[r], tile.row(r));
}

// The group that a walk over tokens reaches kAhead bytes later: the hardware's prefetchers stop at each 4 KB page, and
// the arithmetic of one group fills the out-of-order window long before it reaches the next page by itself.
template <typename T> struct Ahead {
  static constexpr int64_t kAhead = 64 << 10;
  int64_t offset;

  Ahead(const Rows& rows, const LinearTask& task, int64_t d)
      : offset((kAhead / (task.heads * d * int64_t(sizeof(T)) + 1) + 1) * rows.token) {}

  template <int kStride> INFSA_INLINE Group<T, kStride> operator()(Group<T, kStride> x) const {
    return x.after(offset);
  }
};

// Asks for the line in which vector c of row r begins. Into the second-level cache, and one by one between the vectors
// of a loop whose own loads hit: requests in a burst, or beside loads that miss, wait for the few buffers that a
// first-level cache has for lines under way, and the arithmetic waits with them (on Zen 4 half of the time).
template <typename T, int kStride> INFSA_INLINE void prefetch(Group<T, kStride> x, int64_t r, int64_t c) {
  if (c * kLanes<Acc<T>> * sizeof(T) % 64 == 0) __builtin_prefetch(x.row(r) + c * kLanes<Acc<T>>, 0, 2);
}

// Lane r: row r . vector r, the vectors `vector_stride` apart (0: the same for all).
template <typename E, int kStride, typename A>
INFSA_INLINE Vec<A> dots(Group<E, kStride> x, const A* vector, int64_t vector_stride, int64_t rows, int64_t vecs) {
  return sum_rows<A>([&](int r) INFSA_LAMBDA {
    Vec<A> sum{};
    if (r < rows) {
      for (int64_t c = 0; c < vecs; ++c)
        sum += load(x.row(r) + c * kLanes<A>) * load(vector + r * vector_stride + c * kLanes<A>);
    }
    return sum;
  });
}

// Lane r: ||row r||.
template <typename A, typename E, int kStride>
INFSA_INLINE Vec<A> norms(Group<E, kStride> x, int64_t rows, int64_t vecs) {
  return sqrt(sum_rows<A>([&](int r) INFSA_LAMBDA {
    Vec<A> sum{};
    if (r < rows) {
      for (int64_t c = 0; c < vecs; ++c) {
        const Vec<A> e = load(x.row(r) + c * kLanes<A>);
        sum += e * e;
      }
    }
    return sum;
  }));
}

// Rows of one head: sums += weight r * row r, and where kPlain plain += row r; calls each(r, c) at its vector c.
template <bool kPlain, typename E, int kStride, typename A, typename Each>
INFSA_INLINE void add_head(A* sums, A* plain, Group<E, kStride> x, Vec<A> weight, int64_t rows, int64_t vecs,
                           const Each& each) {
  A w[kLanes<A>];
  store(w, weight);
  for (int64_t c = 0; c < vecs; ++c) {
    // Four chains: one alone would wait for each addition before it.
    Vec<A> sum[4] = {load(sums + c * kLanes<A>)}, all[4] = {};
    if constexpr (kPlain) all[0] = load(plain + c * kLanes<A>);
    for (int64_t r = 0; r < rows; ++r) {
      each(r, c);
      const Vec<A> e = load(x.row(r) + c * kLanes<A>);
      sum[r % 4] += w[r] * e;
      if constexpr (kPlain) all[r % 4] += e;
    }
    store(sums + c * kLanes<A>, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    if constexpr (kPlain) store(plain + c * kLanes<A>, (all[0] + all[1]) + (all[2] + all[3]));
  }
}

// Heads of some tokens, whose groups lie `next` elements apart and have their weights in w: the same per head. Each sum
// is loaded and stored once for all of these tokens, which it adds up in their order.
template <bool kPlain, typename E, int kStride, typename A, typename Each>
INFSA_INLINE void add_heads(A* sums, A* plain, int64_t sums_stride, Group<E, kStride> x, int64_t next,
                            const A (*w)[kLanes<A>], int64_t tokens, int64_t rows, int64_t vecs, const Each& each) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < vecs; ++c) {
      const int64_t at = r * sums_stride + c * kLanes<A>;
      Vec<A> sum = load(sums + at), all{};
      if constexpr (kPlain) all = load(plain + at);
      for (int64_t t = 0; t < tokens; ++t) {
        each(t, r, c);
        const Vec<A> e = load(x.after(t * next).row(r) + c * kLanes<A>);
        sum += w[t][r] * e;
        if constexpr (kPlain) all += e;
      }
      store(sums + at, sum);
      if constexpr (kPlain) store(plain + at, all);
    }
  }
}

// row r = weight r * vector r; calls each(r, c) at its vector c.
template <typename E, int kStride, typename A, typename Each>
INFSA_INLINE void write_rank_one(Group<E, kStride> out, Vec<A> weight, const A* vector, int64_t vector_stride,
                                 int64_t rows, int64_t vecs, const Each& each) {
  A w[kLanes<A>];
  store(w, weight);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < vecs; ++c) {
      each(r, c);
      store(out.row(r) + c * kLanes<A>, w[r] * load(vector + r * vector_stride + c * kLanes<A>));
    }
  }
}

// body(n, h, rows, tokens) for each group of tokens [begin, end) and all heads of the task; `rows` a constant for whole
// groups. Groups of heads come kTokens at once, and the tokens that are left over one by one.
template <bool kOneHead, int64_t kRows, int64_t kTokens, typename Body>
INFSA_INLINE void for_groups(int64_t begin, int64_t end, int64_t heads, const Body& body) {
  const auto for_heads = [&](int64_t n, auto tokens) INFSA_LAMBDA {
    for (int64_t h = 0; h < heads; h += kRows) {
      const int64_t rows = least(kRows, kOneHead ? end - n : heads - h);
      if (rows == kRows) {
        body(n, h, kRows, tokens);
      } else {
        body(n, h, rows, tokens);
      }
    }
  };
  int64_t n = begin;
  if constexpr (kTokens > 1) {
    for (; n + kTokens <= end; n += kTokens) for_heads(n, std::integral_constant<int64_t, kTokens>());
  }
  for (; n < end; n += kOneHead ? kRows : 1) for_heads(n, std::integral_constant<int64_t, 1>());
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
