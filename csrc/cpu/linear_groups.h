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
};

// Rows of one group: vectors of T, a constant number of elements apart where kStride is not 0, so that the compiler
// needs one address for all of them.
template <typename T, int kStride = 0> struct Group {
  T* data;
  int64_t stride;

  INFSA_INLINE T* row(int64_t r) const { return data + r * (kStride ? kStride : stride); }
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
    return {x.data + offset, x.stride};
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

// sums (of its head) += weight r * row r; calls each(r, c) at its vector c.
template <bool kOneHead, typename E, int kStride, typename A, typename Each>
INFSA_INLINE void add_weighted(A* sums, int64_t sums_stride, Group<E, kStride> x, Vec<A> weight, int64_t rows,
                               int64_t vecs, const Each& each) {
  A w[kLanes<A>];
  store(w, weight);
  if constexpr (kOneHead) {
    for (int64_t c = 0; c < vecs; ++c) {
      // Four chains: one alone would wait for each addition before it.
      Vec<A> sum[4] = {load(sums + c * kLanes<A>)};
      for (int64_t r = 0; r < rows; ++r) {
        each(r, c);
        sum[r % 4] += w[r] * load(x.row(r) + c * kLanes<A>);
      }
      store(sums + c * kLanes<A>, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < vecs; ++c) {
        each(r, c);
        A* sum = sums + r * sums_stride + c * kLanes<A>;
        store(sum, load(sum) + w[r] * load(x.row(r) + c * kLanes<A>));
      }
    }
  }
}

// The same, and plain (of its head) += row r.
template <bool kOneHead, typename E, int kStride, typename A, typename Each>
INFSA_INLINE void add_weighted_and_plain(A* sums, A* plain, int64_t sums_stride, Group<E, kStride> x, Vec<A> weight,
                                         int64_t rows, int64_t vecs, const Each& each) {
  A w[kLanes<A>];
  store(w, weight);
  if constexpr (kOneHead) {
    for (int64_t c = 0; c < vecs; ++c) {
      Vec<A> sum[4] = {load(sums + c * kLanes<A>)}, all[4] = {load(plain + c * kLanes<A>)};
      for (int64_t r = 0; r < rows; ++r) {
        each(r, c);
        const Vec<A> e = load(x.row(r) + c * kLanes<A>);
        sum[r % 4] += w[r] * e;
        all[r % 4] += e;
      }
      store(sums + c * kLanes<A>, (sum[0] + sum[1]) + (sum[2] + sum[3]));
      store(plain + c * kLanes<A>, (all[0] + all[1]) + (all[2] + all[3]));
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < vecs; ++c) {
        each(r, c);
        const int64_t at = r * sums_stride + c * kLanes<A>;
        const Vec<A> e = load(x.row(r) + c * kLanes<A>);
        store(sums + at, load(sums + at) + w[r] * e);
        store(plain + at, load(plain + at) + e);
      }
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
