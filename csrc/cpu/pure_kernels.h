// Pure InfSA on the CPU, one (keys x queries) rectangle of one head at a time.
//
//   P = ReLU(s^2 q k^T)   (N, M)      F = ||P||_F      out = rho P v / (F + eps)
//
// q (N,d), k (M,d), v (M,d_v), s = d^(-1/2). The forward pass makes P in blocks that stay in L2, sums P^2 and adds P v
// at once; only F is saved. The backward pass makes the same blocks again.
//
// Blocks lie transposed, [key][query]: queries along the vector, so that q alone has to be turned (once per block row),
// and P^T and dS^T serve both as (keys x queries) and as (queries x keys) left operands. When k is q, P is symmetric:
// one block serves the two rectangles that mirror each other.
//
// Included by isa_<set>.cpp only.
#pragma once

#include "convert.h"
#include "gemm.h"
#include "pure.h"

namespace infsa::cpu::INFSA_ISA {

static_assert(kPureBlock % kTileRows == 0 && kPureBlock % kPanel<float> == 0 && kPureStride % kTileRows == 0 &&
              kPureStride % kLanes<float> == 0);

// The working memory of one thread. Blocks hold at most kPureStride tokens, fewer when the head has fewer.
template <typename A> struct PureScratch {
  int64_t wide, wide_v;    // padded d and d_v
  A *q_rows, *query_rows;  // of the queries' block: q, and g = dout / (F + eps) or v
  A *q_panels, *g_panels;  // the same with queries along the vector; behind g_i stands v_i when k is q
  A *k_rows, *v_rows;      // of the keys' block: k, and v; behind v_j stands g_j when k is q
  A *p, *ds;               // P^T and dS^T, [key][query]
  A* squares;              // sum_j P_ij^2
  // Of few columns, kPureStride apart: v of the keys' and of the queries' block, and P v; P^T v by vectors of queries.
  A *v_keys, *v_queries, *to_queries, *to_keys;
  Arena arena;

  PureScratch(const PureHead& h, bool backward, void* memory)
      : wide(row_length<A>(h.d)), wide_v(row_length<A>(h.d_v)), arena(memory) {
    // A tile of rows reads on to its end, a vector of queries to the end of its panel.
    const int64_t queries = least(round_up(kPureStride, kPanel<A>), round_up(h.N, kPanel<A>));
    const int64_t keys = least(kPureStride, round_up(h.M, kTileRows));
    const int64_t sides = backward && h.tied ? 2 : 1;
    const int64_t few = backward || !h.few_columns ? 0 : h.d_v * kPureStride;
    q_rows = arena.take<A>(queries * wide);
    q_panels = arena.take<A>(queries * wide);
    k_rows = arena.take<A>(keys * wide);
    v_rows = arena.take<A>(few ? 0 : keys * wide_v * sides);
    p = arena.take<A>(few ? 0 : keys * kPureStride);
    squares = arena.take<A>(queries);
    query_rows = arena.take<A>(backward || (h.tied && !few) ? queries * wide_v : 0);
    g_panels = arena.take<A>(backward ? queries * wide_v * sides : 0);
    ds = arena.take<A>(backward ? keys * kPureStride : 0);
    v_keys = arena.take<A>(few);
    v_queries = arena.take<A>(few);
    to_queries = arena.take<A>(few);
    to_keys = arena.take<A>(few * kLanes<A>);
  }
  int64_t bytes() const { return arena.bytes; }
};

// One tile of products over the depth, in runs of kRun where that is asked for.
template <int kVectors, bool kRuns, typename E, typename Done>
INFSA_INLINE void row_tile(const E* rows, int64_t stride, const E* panel, int64_t depth, Done&& done) {
  if constexpr (kRuns) {
    Vec<SumOf<E>> total[kTileRows][kVectors] = {};
    for (int64_t l = 0; l < depth; l += kRun) {
      tile<kVectors>(rows + l, stride, 1, panel + l * kPanel<E>, kPanel<E>, least(depth - l, kRun),
                     [&](auto& c) INFSA_LAMBDA {
#pragma GCC unroll 12
                       for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 2
                         for (int v = 0; v < kVectors; ++v) total[r][v] += c[r][v];
                       }
                     });
    }
    done(total);
  } else {
    tile<kVectors>(rows, stride, 1, panel, kPanel<E>, depth, done);
  }
}

// epilogue(tile, key, query, rows) for every tile of rows(keys) x panels(queries).
template <bool kRuns = false, typename E, typename Epilogue>
INFSA_INLINE void each_tile(int64_t keys, int64_t queries, int64_t depth, const E* rows, int64_t stride,
                            const E* panels, int64_t panel_size, Epilogue&& epilogue) {
  for (int64_t j = 0; j < queries; j += kPanel<E>, panels += panel_size) {
    for (int64_t i = 0; i < keys; i += kTileRows) {
      const auto done = [&](auto& c) INFSA_LAMBDA { epilogue(c, i, j, least(keys - i, kTileRows)); };
      if (queries - j > kLanes<E>) {
        row_tile<kTileVectors, kRuns>(rows + i * stride, stride, panels, depth, done);
      } else {
        row_tile<1, kRuns>(rows + i * stride, stride, panels, depth, done);
      }
    }
  }
}

// P^T = ReLU(k q^T) of one block, s^2 already in q; sum_j P_ij^2 of query i is added to squares[i] when asked for.
template <bool kSquares, bool kRuns, typename A> void make_scores(int64_t keys, int64_t queries, int64_t d,
                                                                  const A* k_rows, int64_t stride, const A* q_panels,
                                                                  A* p, A* squares) {
  each_tile<kRuns>(keys, queries, d, k_rows, stride, q_panels, kPanel<A> * d,
                   [&](auto& c, int64_t i, int64_t j, int64_t rows) INFSA_LAMBDA {
                     constexpr int vectors = sizeof(c[0]) / sizeof(c[0][0]);
                     Vec<A> sum[vectors] = {};
#pragma GCC unroll 12
                     for (int r = 0; r < kTileRows; ++r) {
                       if (r >= rows) break;
#pragma GCC unroll 2
                       for (int v = 0; v < vectors; ++v) {
                         const Vec<A> x = relu(c[r][v]);
                         store(p + (i + r) * kPureStride + j + v * kLanes<A>, x);
                         if (kSquares) sum[v] += x * x;
                       }
                     }
                     if (kSquares) {
                       for (int v = 0; v < vectors; ++v) {
                         A* at = squares + j + v * kLanes<A>;
                         store(at, load(at) + sum[v]);
                       }
                     }
                   });
}

// The same scores in both directions: whether in runs is a matter of the head.
template <bool kSquares, typename A> void scores(const PureHead& h, int64_t keys, int64_t queries, const A* k_rows,
                                                 int64_t stride, const A* q_panels, A* p, A* squares) {
  if (h.few_keys)
    make_scores<kSquares, true>(keys, queries, h.d, k_rows, stride, q_panels, p, squares);
  else
    make_scores<kSquares, false>(keys, queries, h.d, k_rows, stride, q_panels, p, squares);
}

// The scores of one block and at once P v, and P^T v where v_queries is given, of few columns. Lanes of no query are 0;
// NaN where a key is not finite, but then what that key gets is NaN as well: k is q, and its score with itself.
template <bool kRuns, typename A>
void multiply_scores(int64_t keys, int64_t queries, int64_t d, const A* k_rows, int64_t stride, const A* q_panels,
                     int64_t columns, const A* v_keys, const A* v_queries, A* to_queries, A* to_keys, A* squares) {
  const auto add = [](A* at, Vec<A> x) INFSA_LAMBDA { store(at, load(at) + x); };
  each_tile<kRuns>(keys, queries, d, k_rows, stride, q_panels, kPanel<A> * d,
                   [&](auto& c, int64_t i, int64_t j, int64_t rows) INFSA_LAMBDA {
                     constexpr int vectors = sizeof(c[0]) / sizeof(c[0][0]);
                     Vec<A> sum[vectors] = {};
#pragma GCC unroll 12
                     for (int r = 0; r < kTileRows; ++r) {
                       if (r >= rows) break;
#pragma GCC unroll 2
                       for (int v = 0; v < vectors; ++v) {
                         c[r][v] = relu(c[r][v]);
                         sum[v] += c[r][v] * c[r][v];
                       }
                     }
                     for (int v = 0; v < vectors; ++v) add(squares + j + v * kLanes<A>, sum[v]);
                     for (int64_t column = 0; column < columns; ++column) {
                       const A* x = v_keys + column * kPureStride + i;
                       for (int v = 0; v < vectors; ++v) sum[v] = Vec<A>{};
#pragma GCC unroll 12
                       for (int r = 0; r < kTileRows; ++r) {
                         if (r >= rows) break;
#pragma GCC unroll 2
                         for (int v = 0; v < vectors; ++v) sum[v] += c[r][v] * broadcast(x[r]);
                       }
                       A* to = to_queries + column * kPureStride + j;
                       for (int v = 0; v < vectors; ++v) add(to + v * kLanes<A>, sum[v]);
                       if (!v_queries) continue;
                       for (int v = 0; v < vectors; ++v)
                         sum[v] = load(v_queries + column * kPureStride + j + v * kLanes<A>);
                       A* back = to_keys + (column * kPureStride + i) * kLanes<A>;
#pragma GCC unroll 12
                       for (int r = 0; r < kTileRows; ++r) {
                         if (r >= rows) break;
                         Vec<A> part = c[r][0] * sum[0];
                         if constexpr (vectors > 1) part += c[r][1] * sum[1];
                         add(back + r * kLanes<A>, part);
                       }
                     }
                   });
}

// out[token] += sums[token] of few columns: of the queries, and of the keys where `twice`.
template <typename A> void few_columns(const PureHead& h, const PureScratch<A>& s, int64_t keys, int64_t queries,
                                       bool twice, A* out_queries, A* out_keys) {
  const auto clear = [](A* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = 0;
  };
  clear(s.to_queries, h.d_v * kPureStride);
  if (twice) clear(s.to_keys, h.d_v * kPureStride * kLanes<A>);
  const auto multiply = h.few_keys ? multiply_scores<true, A> : multiply_scores<false, A>;
  multiply(keys, queries, h.d, s.k_rows, s.wide, s.q_panels, h.d_v, s.v_keys, twice ? s.v_queries : nullptr,
           s.to_queries, s.to_keys, s.squares);
  for (int64_t column = 0; column < h.d_v; ++column) {
    for (int64_t r = 0; r < queries; ++r) out_queries[r * h.d_v + column] += s.to_queries[column * kPureStride + r];
    for (int64_t r = 0; twice && r < keys; ++r)
      out_keys[r * h.d_v + column] += sum_lanes(load(s.to_keys + (column * kPureStride + r) * kLanes<A>));
  }
}

// dS^T = [P > 0] (v g^T - c P), the scales already in g and c. A NaN score keeps its NaN.
template <typename A> void score_gradients(int64_t keys, int64_t queries, int64_t depth, const A* v_rows,
                                           int64_t stride, const A* g_panels, int64_t panel_size, A c, const A* p,
                                           A* ds) {
  each_tile(keys, queries, depth, v_rows, stride, g_panels, panel_size,
            [&](auto& g, int64_t i, int64_t j, int64_t rows) INFSA_LAMBDA {
              constexpr int vectors = sizeof(g[0]) / sizeof(g[0][0]);
#pragma GCC unroll 12
              for (int r = 0; r < kTileRows; ++r) {
                if (r >= rows) break;
#pragma GCC unroll 2
                for (int v = 0; v < vectors; ++v) {
                  const int64_t at = (i + r) * kPureStride + j + v * kLanes<A>;
                  const Vec<A> x = load(p + at);
                  store(ds + at, x <= A(0) ? Vec<A>{} : g[r][v] - c * x);
                }
              }
            });
}

// The same for a head of few scores, which are this block: F and c = <P, G> / (F (F + eps)) from P and G = v g^T, in
// float64, where the two terms may cancel to the size of eps / F and keep their digits.
template <typename A> void few_score_gradients(const PureHead& h, const A* v_rows, int64_t stride, const A* g_panels,
                                               int64_t panel_size, const A* p, A* ds) {
  each_tile(h.M, h.N, h.d_v, v_rows, stride, g_panels, panel_size,
            [&](auto& g, int64_t i, int64_t j, int64_t rows) INFSA_LAMBDA {
              constexpr int vectors = sizeof(g[0]) / sizeof(g[0][0]);
              for (int r = 0; r < rows; ++r) {
                for (int v = 0; v < vectors; ++v) store(ds + (i + r) * kPureStride + j + v * kLanes<A>, g[r][v]);
              }
            });
  double squares = 0, products = 0;
  for (int64_t j = 0; j < h.M; ++j) {
    for (int64_t i = 0; i < h.N; ++i) {
      const double x = p[j * kPureStride + i];
      squares += x * x;
      products += x * ds[j * kPureStride + i];
    }
  }
  const double F = __builtin_sqrt(squares), c = F == 0 ? 0 : products / (F * (F + h.eps));
  for (int64_t j = 0; j < h.M; ++j) {
    for (int64_t i = 0; i < h.N; ++i) {
      const int64_t at = j * kPureStride + i;
      ds[at] = p[at] <= A(0) ? A(0) : A(ds[at] - c * p[at]);
    }
  }
}

// With a block X^T: to (queries, columns) += X b for b (keys, columns), and to (keys, columns) += X^T b for b (queries,
// columns). The rows of `to` are `columns` apart.
template <typename A>
void add_to_queries(int64_t keys, int64_t queries, const A* block, const A* b, int64_t b_row, int64_t columns, A* to) {
  add_product(queries, columns, keys, block, 1, kPureStride, b, b_row, to, columns);
}

template <typename A>
void add_to_keys(int64_t keys, int64_t queries, const A* block, const A* b, int64_t b_row, int64_t columns, A* to) {
  add_product(keys, columns, queries, block, kPureStride, 1, b, b_row, to, columns);
}

template <typename T>
double pure_forward(const PureHead& h, const PureSums& sums, Range keys, Range queries, bool mirrored, void* memory) {
  using A = Acc<T>;
  const PureScratch<A> s(h, false, memory);
  const int64_t row = h.few_columns ? h.d_v : s.wide_v;
  const auto out = [&](int64_t token) { return static_cast<A*>(sums.out) + token * row; };
  const auto load_v = [&](int64_t begin, int64_t count, A* rows, A* columns) {
    if (h.few_columns)
      load_columns<T>(h.v, begin, count, h.d_v, A(h.unit.v), columns, kPureStride);
    else
      load_rows<T>(h.v, begin, count, h.d_v, A(h.unit.v), rows, s.wide_v);
  };
  // In a chunk met by itself, the blocks below the diagonal mirror those above it.
  const bool diagonal = h.tied && !mirrored;
  double total = 0;
  for (int64_t i = queries.begin, rows; i < queries.end; i += rows) {
    rows = pure_block(queries.end - i);
    load_rows<T>(h.q, i, rows, h.d, A(h.unit.q), s.q_rows, s.wide);
    make_panels(s.q_rows, s.wide, rows, h.d, A(1.0 / h.d), s.q_panels, kPanel<A> * h.d);
    if (h.tied) load_v(i, rows, s.query_rows, s.v_queries);
    const int64_t key_end = diagonal ? i + rows : keys.end;
    for (int64_t j = keys.begin, count; j < key_end; j += count) {
      count = pure_block(key_end - j);
      const bool twice = h.tied && j != i;
      load_rows<T>(h.k, j, count, h.d, A(h.unit.k), s.k_rows, s.wide);
      load_v(j, count, s.v_rows, s.v_keys);
      for (int64_t r = 0; r < rows; ++r) s.squares[r] = 0;
      if (h.few_columns) {
        few_columns(h, s, count, rows, twice, out(i), out(j));
      } else {
        scores<true>(h, count, rows, s.k_rows, s.wide, s.q_panels, s.p, s.squares);
        add_to_queries(count, rows, s.p, s.v_rows, s.wide_v, s.wide_v, out(i));
        if (twice) add_to_keys(count, rows, s.p, s.query_rows, s.wide_v, s.wide_v, out(j));
      }
      // float32 holds no longer sum than one query's over one block.
      double square = 0;
      for (int64_t r = 0; r < rows; ++r) square += s.squares[r];
      total += twice ? 2 * square : square;
    }
  }
  return total;
}

// With g = dout / (F + eps):
//   dP = rho g v^T - c P      dS = [P > 0] dP      dq = s^2 dS k      dk = s^2 dS^T q      dv = rho P^T g
// s^2 and rho go into the panels of g; `finish` brings rho to dv. Blocks that mirror each other (k is q) need dS + dS^T
// alone, whose two halves are one product of depth 2 d_v, [v_j g_j] with [g_i v_i].
template <typename T>
void pure_backward(const PureHead& h, const PureSums& sums, Range keys, Range queries, bool mirrored, void* memory) {
  using A = Acc<T>;
  const PureScratch<A> s(h, true, memory);
  void* dk_sums = h.tied ? sums.dq : sums.dk;
  const auto dq = [&](int64_t token) { return static_cast<A*>(sums.dq) + token * s.wide; };
  const auto dk = [&](int64_t token) { return static_cast<A*>(dk_sums) + token * s.wide; };
  const auto dv = [&](int64_t token) { return static_cast<A*>(sums.dv) + token * s.wide_v; };
  const bool diagonal = h.tied && !mirrored;
  const A q_scale = A(1.0 / h.d), g_scale = A(h.rho / h.d);
  const int64_t depth = h.tied ? s.wide_v + h.d_v : h.d_v, panel = kPanel<A> * depth;
  const int64_t v_stride = h.tied ? 2 * s.wide_v : s.wide_v;
  const A* g_rows = s.v_rows + s.wide_v;
  for (int64_t i = queries.begin, rows; i < queries.end; i += rows) {
    rows = pure_block(queries.end - i);
    load_rows<T>(h.q, i, rows, h.d, A(h.unit.q), s.q_rows, s.wide);
    make_panels(s.q_rows, s.wide, rows, h.d, q_scale, s.q_panels, kPanel<A> * h.d);
    if (h.tied) {
      load_rows<T>(h.v, i, rows, h.d_v, A(h.unit.v), s.query_rows, s.wide_v);
      make_panels(s.query_rows, s.wide_v, rows, h.d_v, g_scale, s.g_panels + s.wide_v * kPanel<A>, panel);
    }
    load_rows<T>(h.dout, i, rows, h.d_v, A(h.unit.dout * h.inverse_norm), s.query_rows, s.wide_v);
    make_panels(s.query_rows, s.wide_v, rows, h.tied ? s.wide_v : h.d_v, g_scale, s.g_panels, panel);
    const int64_t key_end = diagonal ? i + rows : keys.end;
    for (int64_t j = keys.begin, count; j < key_end; j += count) {
      count = pure_block(key_end - j);
      const bool twice = h.tied && j != i;
      load_rows<T>(h.k, j, count, h.d, A(h.unit.k), s.k_rows, s.wide);
      load_rows<T>(h.v, j, count, h.d_v, A(h.unit.v), s.v_rows, v_stride);
      if (twice) load_rows<T>(h.dout, j, count, h.d_v, A(h.unit.dout * h.inverse_norm), s.v_rows + s.wide_v, v_stride);
      scores<false>(h, count, rows, s.k_rows, s.wide, s.q_panels, s.p, s.squares);
      // d(P v): out += P v, and its mirror.
      if (sums.dv) add_to_keys(count, rows, s.p, s.query_rows, s.wide_v, s.wide_v, dv(j));
      if (sums.dv && twice) add_to_queries(count, rows, s.p, g_rows, v_stride, s.wide_v, dv(i));
      if (!sums.dq && !dk_sums) continue;
      // d(ReLU), d(F): P = ReLU(k q^T).
      if (h.few_scores) {
        few_score_gradients(h, s.v_rows, v_stride, s.g_panels, panel, s.p, s.ds);
      } else {
        score_gradients(count, rows, twice ? depth : h.d_v, s.v_rows, v_stride, s.g_panels, panel,
                        A((twice ? 2 : 1) * h.c / h.d), s.p, s.ds);
      }
      if (dk_sums) add_to_keys(count, rows, s.ds, s.q_rows, s.wide, s.wide, dk(j));
      if (sums.dq) add_to_queries(count, rows, s.ds, s.k_rows, s.wide, s.wide, dq(i));
    }
  }
}

template <typename T> constexpr PureKernels pure_kernels() {
  return {
      [](const PureHead& h, bool backward) { return PureScratch<Acc<T>>(h, backward, nullptr).bytes(); },
      pure_forward<T>,
      pure_backward<T>,
  };
}

}  // namespace infsa::cpu::INFSA_ISA
