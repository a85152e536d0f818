// Linear-InfSA on one thread: the passes over a range of tokens, for one instruction set.
//
//   forward, over queries    n_i = ||q_i||,  sums += n_i q_i, n_i      u_i = s q_i, e_i = s n_i, qbar = s^2 sum n q / E
//   forward, over keys       r_j = ReLU(s qbar . k_j),  sums += r_j v_j, r_j
//   backward, over keys      dt_j = [r_j > 0] (rho dz . v_j - rho dz . context) / R,  sums += dt_j k_j
//                            dv_j = r_j / R  rho dz,  dk_j = dt_j s qbar
//   backward, over queries   dq_i = n_i f + (f . q_i - f . qbar / s) / n_i  q_i,      f = s^2 dqbar / E
//                            and + dt_i s qbar where k is q
//
// q (B,H,N,d), k (B,H,M,d), v (B,H,M,dv) of T, any strides. linear.cpp makes the vectors per head between the passes.
//
// Every pass is "one scalar per row, then something rank one": a row costs a dot product whose horizontal sum would
// dominate at d = 16. So rows go in groups of as many as a vector has lanes, reduced together to one vector of scalars.
// A group is that many consecutive tokens of one head (kOneHead: the head's vectors and sums stay in registers) or that
// many heads of one token, which walks a (B, N, H, d) tensor in the order of its memory.
#pragma once

#include "linear.h"
#include "vec.h"

namespace infsa::cpu::INFSA_ISA {
namespace linear {

// float32 sums are flushed to double after this many tokens.
constexpr int64_t kBlock = 128;

INFSA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INFSA_INLINE int64_t padded(int64_t n, int64_t lanes) { return (n + lanes - 1) / lanes * lanes; }

// Rows of one group: `count` vectors of T, `stride` elements apart.
template <typename T> struct Group {
  T* data;
  int64_t stride;
};

// The group of rows that starts at token n, head h.
template <typename T, bool kOneHead>
INFSA_INLINE Group<T> group_at(const LinearRows& rows, const LinearTask& task, int64_t n, int64_t h) {
  return {static_cast<T*>(rows.data) + task.batch * rows.batch + (task.head + h) * rows.head + n * rows.token,
          kOneHead ? rows.token : rows.head};
}

// The units of a group's rows, which begins at head h: `stride` apart, 0 where they share a head.
template <typename A> struct RowUnits {
  const A* data;
  int64_t stride;

  INFSA_INLINE A operator[](int64_t r) const { return data ? data[r * stride] : A(1); }
};

template <bool kOneHead, typename A>
INFSA_INLINE RowUnits<A> units_at(const LinearArgs& args, const LinearTask& task, const void* units, int64_t h) {
  const A* data = static_cast<const A*>(units);
  return {data ? data + task.batch * args.H + task.head + h : nullptr, kOneHead ? 0 : 1};
}

// Copies rows that are no whole vectors (odd d, strided channels) or not in their units to a tile that is, zero padded,
// ...
template <typename T> INFSA_INLINE void pack(Group<T> from, int64_t channel, int64_t rows, int64_t d,
                                             Group<Acc<T>> tile, RowUnits<Acc<T>> unit) {
  constexpr int64_t lanes = kLanes<Acc<T>>;
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = from.data + r * from.stride;
    for (int64_t c = 0; c < d; c += lanes) {
      Vec<Acc<T>> x;
      if (channel == 1) {
        x = c + lanes <= d ? load(row + c) : load_first(row + c, d - c);
      } else {
        T gathered[lanes] = {};
        for (int64_t i = 0; i < smaller(lanes, d - c); ++i) gathered[i] = row[(c + i) * channel];
        x = load(gathered);
      }
      store(tile.data + r * tile.stride + c, x * unit[r]);
    }
  }
}

// ... and back.
template <typename T> INFSA_INLINE void unpack(Group<Acc<T>> tile, int64_t rows, int64_t d, Group<T> to,
                                               int64_t channel, RowUnits<Acc<T>> unit) {
  constexpr int64_t lanes = kLanes<Acc<T>>;
  for (int64_t r = 0; r < rows; ++r) {
    T* row = to.data + r * to.stride;
    for (int64_t c = 0; c < d; c += lanes) {
      const Vec<Acc<T>> x = load(tile.data + r * tile.stride + c) * unit[r];
      if (channel == 1 && c + lanes <= d) {
        store(row + c, x);
      } else {
        T scattered[lanes];
        store(scattered, x);
        for (int64_t i = 0; i < smaller(lanes, d - c); ++i) row[(c + i) * channel] = scattered[i];
      }
    }
  }
}

// Asks for the rows that come about kAhead bytes later in the walk over tokens. The hardware's prefetchers stop at each
// 4 KB page, and the arithmetic of one group fills the out-of-order window long before it reaches the next page by
// itself.
template <typename V> struct Prefetch {
  using T = typename V::T;
  static constexpr int64_t kAhead = 8 << 10, kLine = 64 / sizeof(T);
  int64_t size, offset;

  Prefetch(const LinearRows& rows, const LinearTask& task, int64_t d) : size(d) {
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
  return sum_rows<A>([&](int r) __attribute__((always_inline)) {
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
  return sqrt(sum_rows<A>([&](int r) __attribute__((always_inline)) {
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
      const int64_t rows = smaller(kRows, kOneHead ? end - n : heads - h);
      if (rows == kRows) {
        body(n, h, kRows);
      } else {
        body(n, h, rows);
      }
    }
  }
}

// Calls counted(begin, end) and ignored(begin, end) for the runs of tokens that the mask makes.
template <typename Counted, typename Ignored>
INFSA_INLINE void for_runs(const LinearMask& mask, int64_t batch, int64_t begin, int64_t end, const Counted& counted,
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

// How the kernels below are compiled: T the dtype in memory, kVecs the vectors per row (0: known at run time), kPacked
// through tiles of the accumulation type, which takes any d and any stride between channels.
template <typename T_, bool kOneHead_, int kVecs_, bool kPacked_> struct Variant {
  using T = T_;
  using A = Acc<T>;
  static constexpr bool kOneHead = kOneHead_, kPacked = kPacked_;
  static constexpr int kVecs = kVecs_;
};

// The scratch of a task: sums of one block in the accumulation type, then two tiles.
template <typename A> struct Scratch {
  static constexpr int64_t lanes = kLanes<A>;
  int64_t d, dv, sums_size;
  Scratch(int64_t heads, int64_t d_, int64_t dv_)
      : d(padded(d_, lanes)), dv(padded(dv_, lanes)), sums_size(padded(heads, lanes) * ((d > dv ? d : dv) + 1)) {}
  int64_t size() const { return sums_size + lanes * (d + dv); }
};

// Runs group(n, h, rows) over the tokens that count, block by block, with the sums it adds to flushed to double.
template <typename V, typename Group, typename Ignored>
INFSA_INLINE void for_blocks(const LinearTask& task, const LinearMask& mask, int64_t width, const Group& group,
                             const Ignored& ignored) {
  using A = typename V::A;
  constexpr int64_t lanes = kLanes<A>;
  A* sums = static_cast<A*>(task.scratch);
  const int64_t size = task.heads * width + padded(task.heads, lanes);
  for (int64_t begin = task.begin; begin < task.end; begin += kBlock) {
    const int64_t end = smaller(begin + kBlock, task.end);
    if (task.sums) __builtin_memset(sums, 0, size * sizeof(A));
    for_runs(
        mask, task.batch, begin, end,
        [&](int64_t from, int64_t to) { for_groups<V::kOneHead, lanes>(from, to, task.heads, group); }, ignored);
    if (!task.sums) continue;
    const A* weights = sums + task.heads * width;
    for (int64_t i = 0; i < task.heads * width; ++i) task.sums[i] += sums[i];
    if constexpr (V::kOneHead) {
      task.sums[width] += sum_lanes(load(weights));
    } else {
      for (int64_t h = 0; h < task.heads; ++h) task.sums[task.heads * width + h] += weights[h];
    }
  }
}

// Sums of y weighted by the norm of x (kNorm) or by x's positive score: both passes of the forward.
template <typename V, bool kNorm> void forward(const LinearArgs& args, const LinearTask& task, const LinearRows& x_rows,
                                               const LinearRows& y_rows, const LinearMask& mask, const void* x_unit,
                                               const void* y_unit) {
  using T = typename V::T;
  using A = typename V::A;
  constexpr int64_t lanes = kLanes<A>;
  const Scratch<A> layout(task.heads, args.d, args.dv_size);
  const int64_t width = kNorm ? layout.d : layout.dv, y_size = kNorm ? args.d : args.dv_size;
  const int64_t x_vecs = V::kVecs ? V::kVecs : layout.d / lanes, y_vecs = V::kVecs ? V::kVecs : width / lanes;
  const A* vector = static_cast<const A*>(args.score_query) + (task.batch * args.H + task.head) * layout.d;
  A* sums = static_cast<A*>(task.scratch);
  A* weight_sums = sums + task.heads * width;
  A* tiles = sums + layout.sums_size;
  const Prefetch<V> prefetch_x(x_rows, task, args.d), prefetch_y(y_rows, task, y_size);

  for_blocks<V>(
      task, mask, width,
      [&](int64_t n, int64_t h, int64_t rows) __attribute__((always_inline)) {
        auto x_group = group_at<T, V::kOneHead>(x_rows, task, n, h),
             y_group = group_at<T, V::kOneHead>(y_rows, task, n, h);
        prefetch_x(x_group, rows);
        if (!kNorm) prefetch_y(y_group, rows);
        const auto sum = [&](auto x, auto y) __attribute__((always_inline)) {
          Vec<A> weight;
          if constexpr (kNorm) {
            weight = norms<A>(x, rows, x_vecs);
          } else {
            weight = relu(dots(x, vector + h * layout.d, V::kOneHead ? 0 : layout.d, rows, x_vecs));
          }
          store(weight_sums + h, load(weight_sums + h) + weight);
          add_weighted<V::kOneHead>(sums + h * width, width, y, weight, rows, y_vecs);
        };
        if constexpr (V::kPacked) {
          const Group<A> x{tiles, layout.d}, y{kNorm ? tiles : tiles + lanes * layout.d, width};
          pack(x_group, x_rows.channel, rows, args.d, x, units_at<V::kOneHead, A>(args, task, x_unit, h));
          if (!kNorm) pack(y_group, y_rows.channel, rows, y_size, y, units_at<V::kOneHead, A>(args, task, y_unit, h));
          sum(x, y);
        } else {
          sum(x_group, y_group);
        }
      },
      [](int64_t, int64_t) {});
}

// Rows of ignored tokens: weight * vector, or 0 without weights. Not hot, so one way for every layout.
template <typename T, bool kOneHead> void write_ignored(const LinearRows& rows, const LinearTask& task, int64_t begin,
                                                        int64_t end, int64_t d, const Acc<T>* vector,
                                                        RowUnits<Acc<T>> unit) {
  using A = Acc<T>;
  constexpr int64_t lanes = kLanes<A>;
  const A* weights = static_cast<const A*>(task.dscores);
  if (!rows.data) return;
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t h = 0; h < task.heads; ++h) {
      T* row = group_at<T, kOneHead>(rows, task, n, h).data;
      for (int64_t c = 0; c < d; c += lanes) {
        T out[lanes];
        store(out, vector ? weights[n * task.heads + h] * load(vector + h * padded(d, lanes) + c) * unit[h] : Vec<A>{});
        for (int64_t i = 0; i < smaller(lanes, d - c); ++i) row[(c + i) * rows.channel] = out[i];
      }
    }
  }
}

template <typename V> void backward_keys(const LinearArgs& args, const LinearTask& task) {
  using T = typename V::T;
  using A = typename V::A;
  constexpr int64_t lanes = kLanes<A>;
  constexpr bool kOneHead = V::kOneHead;
  const Scratch<A> layout(task.heads, args.d, args.dv_size);
  const int64_t d_vecs = V::kVecs ? V::kVecs : layout.d / lanes, dv_vecs = V::kVecs ? V::kVecs : layout.dv / lanes;
  const int64_t first_head = task.batch * args.H + task.head;
  const A* score_query = static_cast<const A*>(args.score_query) + first_head * layout.d;
  const A* dcontext = static_cast<const A*>(args.dcontext) + first_head * layout.dv;
  const A* dcontext_dot = static_cast<const A*>(args.dcontext_dot) + first_head;
  const A* score_scale = static_cast<const A*>(args.score_scale) + first_head;
  const int64_t d_stride = kOneHead ? 0 : layout.d, dv_stride = kOneHead ? 0 : layout.dv;
  A* dscores = static_cast<A*>(task.dscores);
  A* sums = static_cast<A*>(task.scratch);
  A* tiles = sums + layout.sums_size;
  const bool want_dscores = task.sums || args.dk.data;
  const Prefetch<V> prefetch_k(args.k, task, args.d), prefetch_v(args.v, task, args.dv_size);

  for_blocks<V>(
      task, args.key_mask, layout.d,
      [&](int64_t n, int64_t h, int64_t rows) __attribute__((always_inline)) {
        const auto at = [&](const LinearRows& r)
                            __attribute__((always_inline)) { return group_at<T, kOneHead>(r, task, n, h); };
        const auto units = [&](const void* p)
                               __attribute__((always_inline)) { return units_at<kOneHead, A>(args, task, p, h); };
        const A* h_score_query = score_query + h * layout.d;
        const A* h_dcontext = dcontext + h * layout.dv;
        const auto per_head = [&](const A* p)
                                  __attribute__((always_inline)) { return kOneHead ? broadcast(*p) : load(p + h); };
        prefetch_k(at(args.k), rows);
        if (want_dscores) prefetch_v(at(args.v), rows);
        // Outputs go last and each through v's tile, which nobody needs by then; k's is read once more for the sums.
        const Group<A> d_tile{tiles, layout.d}, dv_tile{tiles + lanes * layout.d, layout.dv};

        const auto differentiate = [&](auto k, auto v) __attribute__((always_inline)) {
          const Vec<A> score = dots(k, h_score_query, d_stride, rows, d_vecs);
          if (want_dscores) {
            if constexpr (V::kPacked) {
              pack(at(args.v), args.v.channel, rows, args.dv_size, dv_tile, units(args.unit.v));
            }
            const Vec<A> dweight = dots(v, h_dcontext, dv_stride, rows, dv_vecs) - per_head(dcontext_dot);
            // score <= 0 and not score > 0: a score that is NaN passes its gradient on, as in torch.
            const Vec<A> dscore = score <= 0 ? Vec<A>{} : dweight * per_head(score_scale);
            if (dscores) {
              A* to = dscores + n * task.heads + h;
              if (rows == lanes)
                store(to, dscore);
              else
                store_first(to, dscore, rows);
            }
            if (task.sums) add_weighted<kOneHead>(sums + h * layout.d, layout.d, k, dscore, rows, d_vecs);
            if (args.dk.data) {
              if constexpr (V::kPacked) {
                write_rank_one(d_tile, dscore, h_score_query, d_stride, rows, d_vecs);
                unpack(d_tile, rows, args.d, at(args.dk), args.dk.channel, units(args.unit.dk));
              } else {
                write_rank_one(at(args.dk), dscore, h_score_query, d_stride, rows, d_vecs);
              }
            }
          }
          if (args.dv.data) {
            const Vec<A> weight = relu(score) * per_head(score_scale);
            if constexpr (V::kPacked) {
              write_rank_one(dv_tile, weight, h_dcontext, dv_stride, rows, dv_vecs);
              unpack(dv_tile, rows, args.dv_size, at(args.dv), args.dv.channel, units(args.unit.dv));
            } else {
              write_rank_one(at(args.dv), weight, h_dcontext, dv_stride, rows, dv_vecs);
            }
          }
        };
        if constexpr (V::kPacked) {
          pack(at(args.k), args.k.channel, rows, args.d, d_tile, units(args.unit.k));
          differentiate(d_tile, dv_tile);
        } else {
          differentiate(at(args.k), at(args.v));
        }
      },
      [&](int64_t begin, int64_t end) {
        if (dscores) __builtin_memset(dscores + begin * task.heads, 0, (end - begin) * task.heads * sizeof(A));
        write_ignored<T, kOneHead>(args.dk, task, begin, end, args.d, nullptr, {});
        write_ignored<T, kOneHead>(args.dv, task, begin, end, args.dv_size, nullptr, {});
      });
}

template <typename V> void backward_queries(const LinearArgs& args, const LinearTask& task) {
  using T = typename V::T;
  using A = typename V::A;
  constexpr int64_t lanes = kLanes<A>;
  constexpr bool kOneHead = V::kOneHead;
  const Scratch<A> layout(task.heads, args.d, args.dv_size);
  const int64_t vecs = V::kVecs ? V::kVecs : layout.d / lanes;
  const int64_t first_head = task.batch * args.H + task.head;
  const A* score_query = static_cast<const A*>(args.score_query) + first_head * layout.d;
  const A* query_vector = static_cast<const A*>(args.query_vector) + first_head * layout.d;
  const A* query_dot = static_cast<const A*>(args.query_dot) + first_head;
  const int64_t stride = kOneHead ? 0 : layout.d;
  const A* dscores = static_cast<const A*>(task.dscores);
  A* tile_data = static_cast<A*>(task.scratch) + layout.sums_size;
  const Prefetch<V> prefetch_q(args.q, task, args.d);

  for_blocks<V>(
      task, args.query_mask, layout.d,
      [&](int64_t n, int64_t h, int64_t rows) __attribute__((always_inline)) {
        const auto q_group = group_at<T, kOneHead>(args.q, task, n, h),
                   dq_group = group_at<T, kOneHead>(args.dq, task, n, h);
        prefetch_q(q_group, rows);
        const auto differentiate = [&](auto q, auto dq) __attribute__((always_inline)) {
          const Vec<A> norm = norms<A>(q, rows, vecs);
          const Vec<A> dot = dots(q, query_vector + h * layout.d, stride, rows, vecs);
          const Vec<A> along =
              norm == 0 ? Vec<A>{} : (dot - (kOneHead ? broadcast(*query_dot) : load(query_dot + h))) / norm;
          A norm_of[lanes], along_of[lanes], dscore_of[lanes];
          store(norm_of, norm);
          store(along_of, along);
          if (dscores) {
            const A* from = dscores + n * task.heads + h;
            store(dscore_of, rows == lanes ? load(from) : load_first(from, rows));
          }
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < vecs; ++c) {
              const int64_t in_head = h * layout.d + r * stride + c * lanes;
              Vec<A> out =
                  norm_of[r] * load(query_vector + in_head) + along_of[r] * load(q.data + r * q.stride + c * lanes);
              if (dscores) out += dscore_of[r] * load(score_query + in_head);
              store(dq.data + r * dq.stride + c * lanes, out);
            }
          }
        };
        if constexpr (V::kPacked) {
          const Group<A> tile{tile_data, layout.d};
          pack(q_group, args.q.channel, rows, args.d, tile, units_at<kOneHead, A>(args, task, args.unit.q, h));
          differentiate(tile, tile);
          unpack(tile, rows, args.d, dq_group, args.dq.channel, units_at<kOneHead, A>(args, task, args.unit.dq, h));
        } else {
          differentiate(q_group, dq_group);
        }
      },
      [&](int64_t begin, int64_t end) {
        write_ignored<T, kOneHead>(args.dq, task, begin, end, args.d, dscores ? score_query : nullptr,
                                   units_at<kOneHead, A>(args, task, args.unit.dq, 0));
      });
}

struct FwdQueries {
  template <typename V> static void run(const LinearArgs& args, const LinearTask& task) {
    forward<V, true>(args, task, args.q, args.q, args.query_mask, args.unit.q, args.unit.q);
  }
};

struct FwdKeys {
  template <typename V> static void run(const LinearArgs& args, const LinearTask& task) {
    forward<V, false>(args, task, args.k, args.v, args.key_mask, args.unit.k, args.unit.v);
  }
};

struct BwdKeys {
  template <typename V> static void run(const LinearArgs& args, const LinearTask& task) {
    backward_keys<V>(args, task);
  }
};

struct BwdQueries {
  template <typename V> static void run(const LinearArgs& args, const LinearTask& task) {
    backward_queries<V>(args, task);
  }
};

template <typename Kernel, typename T, bool kOneHead>
INFSA_INLINE void run_variant(const LinearArgs& args, const LinearTask& task) {
  constexpr int64_t lanes = kLanes<Acc<T>>;
  bool packed = args.d % lanes || args.dv_size % lanes || args.unit.q;
  const LinearRows* const all[] = {&args.q, &args.k, &args.v, &args.dq, &args.dk, &args.dv};
  for (const LinearRows* rows : all) packed |= rows->data && rows->channel != 1;
  const int64_t vecs = args.d == args.dv_size ? args.d / lanes : 0;
  if (packed) return Kernel::template run<Variant<T, kOneHead, 0, true>>(args, task);
  if (vecs == 1) return Kernel::template run<Variant<T, kOneHead, 1, false>>(args, task);
  if (vecs == 4) return Kernel::template run<Variant<T, kOneHead, 4, false>>(args, task);
  Kernel::template run<Variant<T, kOneHead, 0, false>>(args, task);
}

template <typename Kernel, typename T> void run(const LinearArgs& args, const LinearTask& task) {
  task.heads == 1 ? run_variant<Kernel, T, true>(args, task) : run_variant<Kernel, T, false>(args, task);
}

inline int64_t scratch_bytes(int64_t heads, int64_t d, int64_t dv, int64_t acc_bytes) {
  return acc_bytes * (acc_bytes == 4 ? Scratch<float>(heads, d, dv).size() : Scratch<double>(heads, d, dv).size());
}

template <typename T> constexpr LinearKernels table() {
  return {INFSA_VEC_BYTES, scratch_bytes, run<FwdQueries, T>, run<FwdKeys, T>, run<BwdKeys, T>, run<BwdQueries, T>};
}

}  // namespace linear

const LinearKernels linear_kernels[4] = {linear::table<float>(), linear::table<bf16>(), linear::table<fp16>(),
                                         linear::table<double>()};

}  // namespace infsa::cpu::INFSA_ISA
