// Linear-InfSA on one thread: the passes over a range of tokens, for one instruction set.
//
//   forward, over queries    n_i = ||q_i||,  sums += n_i q_i, n_i      u_i = s q_i, e_i = s n_i, qbar = s^2 sum n q / E
//   forward, over keys       r_j = ReLU(s qbar . k_j),  sums += r_j v_j, r_j
//   backward, over keys      dt_j = [r_j > 0] (rho dz . v_j - rho dz . context) / R,  sums += dt_j k_j
//                            dv_j = r_j / R  rho dz,  dk_j = dt_j s qbar
//   with a floor             sums += v_j and |t_j| too;  dt_j += sign(t_j) m,  dv_j += floor_weight rho dz, per head
//   backward, over queries   dq_i = n_i f + (f . q_i - f . qbar / s) / n_i  q_i,      f = s^2 dqbar / E
//                            and + dt_i s qbar where k is q
//
// q (B,H,N,d), k (B,H,M,d), v (B,H,M,d_v) of T, any strides. linear.cpp makes the vectors per head between the passes.
//
// Included by isa_<set>.cpp only.
#pragma once

#include "linear_groups.h"

namespace infsa::cpu::INFSA_ISA {
namespace linear {

// float32 sums are flushed to double after this many tokens.
constexpr int64_t kBlock = 128;

// The scratch of a task: sums of one block in the accumulation type, then two tiles of rows.
template <typename A> struct Scratch {
  int64_t d, d_v, sums_size;  // d and d_v in whole vectors

  Scratch(int64_t heads, int64_t d_, int64_t d_v_, int kinds)
      : d(row_length<A>(d_)),
        d_v(row_length<A>(d_v_)),
        sums_size(kinds * row_length<A>(heads) * ((d > d_v ? d : d_v) + 1)) {}
  int64_t bytes() const { return (sums_size + kLanes<A> * (d + d_v)) * sizeof(A); }
};

// What the passes have in common: a task's heads, and where it works. kKinds: of sums that they make.
template <typename V, int kKinds = 1> struct Pass {
  using T = typename V::T;
  using A = typename V::A;
  static constexpr int64_t lanes = kLanes<A>;
  static constexpr int kStride = V::kVecs * lanes;
  const LinearArgs& args;
  const LinearTask& task;
  const int64_t d, d_v;  // in whole vectors
  A *const sums, *const d_tile_data, *const d_v_tile_data;

  Pass(const LinearArgs& args, const LinearTask& task, const Scratch<A>& layout)
      : args(args),
        task(task),
        d(layout.d),
        d_v(layout.d_v),
        sums(static_cast<A*>(task.scratch)),
        d_tile_data(sums + layout.sums_size),
        d_v_tile_data(d_tile_data + lanes * d) {}
  Pass(const LinearArgs& args, const LinearTask& task) : Pass(args, task, {task.heads, args.d, args.d_v, kKinds}) {}

  // Vectors of a row, its length, and what lies between the vectors that a group's rows go with: constants where they
  // can be.
  INFSA_INLINE int64_t d_vecs() const { return V::kVecs ? V::kVecs : d / lanes; }
  INFSA_INLINE int64_t d_v_vecs() const { return V::kVecs ? V::kVecs : d_v / lanes; }
  INFSA_INLINE int64_t d_stride() const { return V::kOneHead ? 0 : d_vecs() * lanes; }
  INFSA_INLINE int64_t d_v_stride() const { return V::kOneHead ? 0 : d_v_vecs() * lanes; }
  INFSA_INLINE Group<A> d_tile() const { return {d_tile_data, d}; }
  INFSA_INLINE Group<A> d_v_tile() const { return {d_v_tile_data, d_v}; }

  // The task's part of what there is per head, of `size` numbers each.
  INFSA_INLINE const A* of_heads(const void* all, int64_t size) const {
    return static_cast<const A*>(all) + (task.batch * args.H + task.head) * size;
  }
  // The group of rows that starts at token n, head h.
  INFSA_INLINE Group<T, kStride> group(const Rows& rows, int64_t n, int64_t h) const {
    return {static_cast<T*>(rows.data) + task.batch * rows.batch + (task.head + h) * rows.head + n * rows.token,
            V::kOneHead ? rows.token : rows.head};
  }
  INFSA_INLINE RowUnits<A> units(const void* all, int64_t h) const {
    return {all ? of_heads(all, 1) + h : nullptr, V::kOneHead ? 0 : 1};
  }
  // A scalar per head, for the rows of the group at head h.
  INFSA_INLINE Vec<A> per_row(const A* scalars, int64_t h) const {
    return V::kOneHead ? broadcast(*scalars) : load(scalars + h);
  }

  // Runs group(n, h, rows, tokens) over the tokens that count, block by block, with the sums it adds to flushed to
  // double.
  template <int64_t kTokens, typename OfGroup, typename Ignored>
  INFSA_INLINE void for_blocks(const Mask& mask, int64_t width, const OfGroup& group, const Ignored& ignored) const {
    const int64_t vectors = kKinds * task.heads * width, row = row_length<A>(task.heads), size = vectors + kKinds * row;
    for (int64_t begin = task.begin; begin < task.end; begin += kBlock) {
      const int64_t end = least(begin + kBlock, task.end);
      if (task.sums) __builtin_memset(sums, 0, size * sizeof(A));
      for_runs(
          mask, task.batch, begin, end,
          [&](int64_t from, int64_t to) { for_groups<V::kOneHead, lanes, kTokens>(from, to, task.heads, group); },
          ignored);
      if (task.sums) begin == task.begin ? flush<true>(vectors, row) : flush<false>(vectors, row);
    }
  }

  // The sums of the task's first block are 0 before.
  template <bool kFirst> void flush(int64_t vectors, int64_t row) const {
    const auto add = [&](double* to, const A* from, int64_t n) INFSA_LAMBDA {
      for (int64_t i = 0; i < n; ++i) to[i] = (kFirst ? 0 : to[i]) + from[i];
    };
    add(task.sums, sums, vectors);
    for (int kind = 0; kind < kKinds; ++kind) {
      const A* weights = sums + vectors + kind * row;
      const A of_lanes = V::kOneHead ? sum_lanes(load(weights)) : A(0);
      add(task.sums + vectors + kind * task.heads, V::kOneHead ? &of_lanes : weights, task.heads);
    }
  }

  // Rows of ignored tokens: weight * vector where the token is a key that counts, or 0 without weights. Not hot, so one
  // way for every layout, by the tiles, and by a Pass of its own: that of the hot loop stays in registers.
  static void write_ignored(const LinearArgs& args, const LinearTask& task, const Rows& rows, int64_t begin,
                            int64_t end, int64_t size, const A* weights, const A* vectors, const void* unit) {
    if (!rows.data) return;
    const Pass pass(args, task);
    const int64_t width = row_length<A>(size);
    const Mask& mask = args.key_mask;
    for (int64_t n = begin; n < end; ++n) {
      const bool is_key = weights && !(mask.data && mask.data[task.batch * mask.batch + n * mask.token]);
      for (int64_t h = 0; h < task.heads; ++h) {
        for (int64_t c = 0; c < width; c += lanes)
          store(pass.d_tile_data + c, is_key ? weights[n * task.heads + h] * load(vectors + h * width + c) : Vec<A>{});
        store_row(pass.group(rows, n, h).data, rows.channel, size, pass.units(unit, h)[0], pass.d_tile_data);
      }
    }
  }
};

enum class Weight { norm, score, floored_score };

// Sums of y weighted by the norm of x or by x's positive score: both passes of the forward. With a floor also the sum
// of y itself and that of the absolute scores.
template <typename V, Weight kWeight> void forward(const LinearArgs& args, const LinearTask& task, const Rows& x_rows,
                                                   const Rows& y_rows, const Mask& mask, const void* x_unit,
                                                   const void* y_unit) {
  using A = typename V::A;
  constexpr bool kNorm = kWeight == Weight::norm, kFloor = kWeight == Weight::floored_score;
  const Pass<V, kFloor ? 2 : 1> pass(args, task);
  const int64_t width = kNorm ? pass.d : pass.d_v, y_size = kNorm ? args.d : args.d_v;
  const int64_t y_vecs = kNorm ? pass.d_vecs() : pass.d_v_vecs(), stride = kNorm ? pass.d_stride() : pass.d_v_stride();
  const A* vector = pass.of_heads(args.score_query, pass.d);
  A *sums = pass.sums, *plain = sums + task.heads * width, *weight_sums = kFloor ? plain + task.heads * width : plain;
  A* absolute_sums = weight_sums + row_length<A>(task.heads);
  const Ahead<typename V::T> x_ahead(x_rows, task, args.d), y_ahead(y_rows, task, y_size);

  const auto group = [&](int64_t n, int64_t h, int64_t rows, auto tokens) INFSA_LAMBDA {
    const auto x_group = pass.group(x_rows, n, h), y_group = pass.group(y_rows, n, h);
    const auto next_x = x_ahead(x_group), next_y = y_ahead(y_group);
    const auto each = [&](int64_t t, int64_t r, int64_t c) INFSA_LAMBDA {
      if constexpr (!V::kPacked) {
        prefetch(next_y.after(t * y_rows.token), r, c);
        if constexpr (!kNorm) prefetch(next_x.after(t * x_rows.token), r, c);
      }
    };
    // The weights of the rows, which their sums gain.
    const auto weigh = [&](auto x) INFSA_LAMBDA {
      Vec<A> weight;
      if constexpr (kNorm) {
        weight = norms<A>(x, rows, pass.d_vecs());
      } else {
        const Vec<A> score = dots(x, vector + h * pass.d, pass.d_stride(), rows, pass.d_vecs());
        weight = relu(score);
        if constexpr (kFloor) store(absolute_sums + h, load(absolute_sums + h) + abs(score));
      }
      store(weight_sums + h, load(weight_sums + h) + weight);
      return weight;
    };
    const auto sum = [&](auto x, auto y) INFSA_LAMBDA {
      A *to = sums + h * width, *to_plain = plain + h * width;
      if constexpr (V::kOneHead) {
        add_head<kFloor>(to, to_plain, y, weigh(x), rows, y_vecs,
                         [&](int64_t r, int64_t c) INFSA_LAMBDA { each(0, r, c); });
      } else {
        constexpr int64_t kTokens = decltype(tokens)::value;
        A w[kTokens][kLanes<A>];
        for (int64_t t = 0; t < kTokens; ++t) store(w[t], weigh(x.after(t * x_rows.token)));
        add_heads<kFloor>(to, to_plain, stride, y, y_rows.token, w, kTokens, rows, y_vecs, each);
      }
    };
    if constexpr (V::kPacked) {
      const Group<A> x = pass.d_tile(), y = kNorm ? x : pass.d_v_tile();
      pack(x_group, x_rows.channel, rows, args.d, x, pass.units(x_unit, h));
      if (!kNorm) pack(y_group, y_rows.channel, rows, y_size, y, pass.units(y_unit, h));
      sum(x, y);
    } else {
      sum(x_group, y_group);
    }
  };
  const auto ignored = [](int64_t, int64_t) {};
  if (V::kTokens > 1 && args.in_cache)
    pass.template for_blocks<V::kTokens>(mask, width, group, ignored);
  else
    pass.template for_blocks<1>(mask, width, group, ignored);
}

template <typename V, bool kFloor> void backward_keys(const LinearArgs& args, const LinearTask& task) {
  using A = typename V::A;
  constexpr int64_t lanes = kLanes<A>;
  const Pass<V> pass(args, task);
  const A *score_query = pass.of_heads(args.score_query, pass.d), *dcontext = pass.of_heads(args.dcontext, pass.d_v);
  const A *dcontext_dot = pass.of_heads(args.dcontext_dot, 1), *score_scale = pass.of_heads(args.score_scale, 1);
  const A* floor_weight = kFloor ? pass.of_heads(args.floor_weight, 1) : nullptr;
  const A* floor_gradient = kFloor ? pass.of_heads(args.floor_gradient, 1) : nullptr;
  A* dscores = static_cast<A*>(task.dscores);
  const bool want_dscores = task.sums || args.dk.data;
  const Ahead<typename V::T> k_ahead(args.k, task, args.d), v_ahead(args.v, task, args.d_v);

  pass.template for_blocks<1>(
      args.key_mask, pass.d,
      [&](int64_t n, int64_t h, int64_t rows, auto) INFSA_LAMBDA {
        const auto at = [&](const Rows& r) INFSA_LAMBDA { return pass.group(r, n, h); };
        const A *h_score_query = score_query + h * pass.d, *h_dcontext = dcontext + h * pass.d_v;
        const auto each_k = [&, next = k_ahead(at(args.k))](int64_t r, int64_t c) INFSA_LAMBDA {
          if constexpr (!V::kPacked) prefetch(next, r, c);
        };
        const auto each_v = [&, next = v_ahead(at(args.v))](int64_t r, int64_t c) INFSA_LAMBDA {
          if constexpr (!V::kPacked) prefetch(next, r, c);
        };
        const auto nothing = [](int64_t, int64_t) INFSA_LAMBDA {};
        // Outputs go last and each through v's tile, which nobody needs by then; k's is read once more for the sums.
        const Group<A> d_tile = pass.d_tile(), d_v_tile = pass.d_v_tile();

        const auto differentiate = [&](auto k, auto v) INFSA_LAMBDA {
          const Vec<A> score = dots(k, h_score_query, pass.d_stride(), rows, pass.d_vecs());
          if (want_dscores) {
            if constexpr (V::kPacked) {
              pack(at(args.v), args.v.channel, rows, args.d_v, d_v_tile, pass.units(args.unit.v, h));
            }
            const Vec<A> dweight =
                dots(v, h_dcontext, pass.d_v_stride(), rows, pass.d_v_vecs()) - pass.per_row(dcontext_dot, h);
            // score <= 0 and not score > 0: a score that is NaN passes its gradient on, as in torch.
            Vec<A> dscore = score <= 0 ? Vec<A>{} : dweight * pass.per_row(score_scale, h);
            if constexpr (kFloor) dscore += sign(score) * pass.per_row(floor_gradient, h);
            if (dscores) {
              A* to = dscores + n * task.heads + h;
              if (rows == lanes)
                store(to, dscore);
              else
                store_first(to, dscore, rows);
            }
            if (task.sums) {
              A* sums = pass.sums + h * pass.d;
              if constexpr (V::kOneHead) {
                add_head<false>(sums, sums, k, dscore, rows, pass.d_vecs(), each_k);
              } else {
                A w[1][lanes];
                store(w[0], dscore);
                add_heads<false>(sums, sums, pass.d_stride(), k, 0, w, 1, rows, pass.d_vecs(),
                                 [&](int64_t, int64_t r, int64_t c) INFSA_LAMBDA { each_k(r, c); });
              }
            }
            if (args.dk.data) {
              if constexpr (V::kPacked) {
                write_rank_one(d_tile, dscore, h_score_query, pass.d_stride(), rows, pass.d_vecs(), nothing);
                unpack(d_tile, rows, args.d, at(args.dk), args.dk.channel, pass.units(args.unit.dk, h));
              } else {
                write_rank_one(at(args.dk), dscore, h_score_query, pass.d_stride(), rows, pass.d_vecs(), nothing);
              }
            }
          }
          if (args.dv.data) {
            Vec<A> weight = relu(score) * pass.per_row(score_scale, h);
            if constexpr (kFloor) weight += pass.per_row(floor_weight, h);
            if constexpr (V::kPacked) {
              write_rank_one(d_v_tile, weight, h_dcontext, pass.d_v_stride(), rows, pass.d_v_vecs(), nothing);
              unpack(d_v_tile, rows, args.d_v, at(args.dv), args.dv.channel, pass.units(args.unit.dv, h));
            } else {
              write_rank_one(at(args.dv), weight, h_dcontext, pass.d_v_stride(), rows, pass.d_v_vecs(), each_v);
            }
          }
        };
        if constexpr (V::kPacked) {
          pack(at(args.k), args.k.channel, rows, args.d, d_tile, pass.units(args.unit.k, h));
          differentiate(d_tile, d_v_tile);
        } else {
          differentiate(at(args.k), at(args.v));
        }
      },
      [&](int64_t begin, int64_t end) {
        if (dscores) __builtin_memset(dscores + begin * task.heads, 0, (end - begin) * task.heads * sizeof(A));
        Pass<V>::write_ignored(args, task, args.dk, begin, end, args.d, nullptr, nullptr, nullptr);
        Pass<V>::write_ignored(args, task, args.dv, begin, end, args.d_v, nullptr, nullptr, nullptr);
      });
}

template <typename V> void backward_queries(const LinearArgs& args, const LinearTask& task) {
  using A = typename V::A;
  constexpr int64_t lanes = kLanes<A>;
  const Pass<V> pass(args, task);
  const int64_t vecs = pass.d_vecs(), stride = pass.d_stride();
  const A *score_query = pass.of_heads(args.score_query, pass.d),
          *query_vector = pass.of_heads(args.query_vector, pass.d), *query_dot = pass.of_heads(args.query_dot, 1);
  const A* dscores = static_cast<const A*>(task.dscores);
  const Ahead<typename V::T> q_ahead(args.q, task, args.d);

  pass.template for_blocks<1>(
      args.query_mask, pass.d,
      [&](int64_t n, int64_t h, int64_t rows, auto) INFSA_LAMBDA {
        const auto q_group = pass.group(args.q, n, h), dq_group = pass.group(args.dq, n, h);
        const auto next_q = q_ahead(q_group);
        const auto differentiate = [&](auto q, auto dq) INFSA_LAMBDA {
          const Vec<A> norm = norms<A>(q, rows, vecs);
          const Vec<A> dot = dots(q, query_vector + h * pass.d, stride, rows, vecs);
          const Vec<A> along = norm == 0 ? Vec<A>{} : (dot - pass.per_row(query_dot, h)) / norm;
          A norm_of[lanes], along_of[lanes], dscore_of[lanes];
          store(norm_of, norm);
          store(along_of, along);
          if (dscores) {
            const A* from = dscores + n * task.heads + h;
            store(dscore_of, rows == lanes ? load(from) : load_first(from, rows));
          }
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < vecs; ++c) {
              if constexpr (!V::kPacked) prefetch(next_q, r, c);
              const int64_t in_head = h * pass.d + r * stride + c * lanes;
              Vec<A> out = norm_of[r] * load(query_vector + in_head) + along_of[r] * load(q.row(r) + c * lanes);
              if (dscores) out += dscore_of[r] * load(score_query + in_head);
              store(dq.row(r) + c * lanes, out);
            }
          }
        };
        if constexpr (V::kPacked) {
          const Group<A> tile = pass.d_tile();
          pack(q_group, args.q.channel, rows, args.d, tile, pass.units(args.unit.q, h));
          differentiate(tile, tile);
          unpack(tile, rows, args.d, dq_group, args.dq.channel, pass.units(args.unit.dq, h));
        } else {
          differentiate(q_group, dq_group);
        }
      },
      [&](int64_t begin, int64_t end) {
        Pass<V>::write_ignored(args, task, args.dq, begin, end, args.d, dscores, score_query, args.unit.dq);
      });
}

template <typename V> void run_variant(LinearPass pass, const LinearArgs& args, const LinearTask& task) {
  switch (pass) {
    case LinearPass::forward_queries:
      return forward<V, Weight::norm>(args, task, args.q, args.q, args.query_mask, args.unit.q, args.unit.q);
    case LinearPass::forward_keys:
      return forward<V, Weight::score>(args, task, args.k, args.v, args.key_mask, args.unit.k, args.unit.v);
    case LinearPass::forward_keys_floor:
      return forward<V, Weight::floored_score>(args, task, args.k, args.v, args.key_mask, args.unit.k, args.unit.v);
    case LinearPass::backward_keys:
      return backward_keys<V, false>(args, task);
    case LinearPass::backward_keys_floor:
      return backward_keys<V, true>(args, task);
    case LinearPass::backward_queries:
      return backward_queries<V>(args, task);
  }
}

template <typename T, bool kOneHead>
void choose_variant(LinearPass pass, const LinearArgs& args, const LinearTask& task) {
  constexpr int64_t lanes = kLanes<Acc<T>>;
  bool packed = args.d % lanes || args.d_v % lanes || args.unit.q, dense = args.d == args.d_v;
  const Rows* const all[] = {&args.q, &args.k, &args.v, &args.dq, &args.dk, &args.dv};
  for (const Rows* rows : all) {
    packed |= rows->data && rows->channel != 1;
    dense &= !rows->data || (kOneHead ? rows->token : rows->head) == args.d;
  }
  const int64_t vecs = dense ? args.d / lanes : 0;
  if (packed) return run_variant<Variant<T, kOneHead, 0, true>>(pass, args, task);
  if (vecs == 1) return run_variant<Variant<T, kOneHead, 1, false>>(pass, args, task);
  if (vecs == 4) return run_variant<Variant<T, kOneHead, 4, false>>(pass, args, task);
  run_variant<Variant<T, kOneHead, 0, false>>(pass, args, task);
}

template <typename A> void divide(const double* sums, int64_t n, double factor, double norm, double unit, void* x_data,
                                  double scale, void* scaled_data) {
  A* __restrict x = static_cast<A*>(x_data), * __restrict scaled = static_cast<A*>(scaled_data);
  for (int64_t i = 0; i < n; ++i) {
    x[i] = A(factor * sums[i] / norm * unit);
    scaled[i] = A(scale * x[i]);
  }
}

template <typename A> void add_mean(double* __restrict sums, const double* values, int64_t n, double count,
                                    double share, double unit, void* mean_data) {
  A* __restrict mean = static_cast<A*>(mean_data);
  const double per_key = 1 / count;
  // Every weight is above 0: where a value is infinite so is the result, though its score be 0.
  const bool shares = share > 0 && __builtin_isfinite(share);
  for (int64_t i = 0; i < n; ++i) {
    const double value = values[i] * per_key;
    mean[i] = A(value * unit);
    sums[i] = shares && __builtin_isinf(value) ? value : sums[i] + share * value;
  }
}

}  // namespace linear

template <typename T> constexpr LinearKernels linear_kernels() {
  return {
      [](LinearPass pass, int64_t heads, int64_t d, int64_t d_v) {
        return linear::Scratch<Acc<T>>(heads, d, d_v, pass == LinearPass::forward_keys_floor ? 2 : 1).bytes();
      },
      [](LinearPass pass, const LinearArgs& args, const LinearTask& task) {
        task.heads == 1 ? linear::choose_variant<T, true>(pass, args, task)
                        : linear::choose_variant<T, false>(pass, args, task);
      },
      [](double* sums, int64_t size, int64_t chunks) {
        for (const double *part = sums + size, *end = sums + chunks * size; part < end; part += size) {
          for (int64_t i = 0; i < size; ++i) sums[i] += part[i];
        }
      },
      largest_of<double>,
      linear::divide<Acc<T>>,
      linear::add_mean<Acc<T>>,
  };
}

}  // namespace infsa::cpu::INFSA_ISA
