// Pure InfSA on bfloat16 where the CPU multiplies it in pairs (pairs.h): the rectangles of pure_kernels.h, with P and
// dS rounded to bfloat16 before they are multiplied, as on GPUs. All sums are float32, and F is that of P as it was.
//
// Included by isa_<set>.cpp only, of sets that define INFSA_BF16_PRODUCTS.
#pragma once

#include "pure_kernels.h"

namespace infsa::cpu::INFSA_ISA {

static_assert(kTileRows % 2 == 0 && kPureBlock % 2 == 0 && kPureStride % kLanes<Pair> == 0);

// A block X^T as the left side of products: over keys in pairs of keys, (pairs of keys, kPureStride), and over queries
// in pairs of queries, (keys, kPureStride / 2).
struct PairBlock {
  Pair *by_keys, *by_queries;

  // Rows i and i + 1 from query j on, for either side or both.
  template <int kVectors> INFSA_INLINE void set(int64_t i, int64_t j, const VecF32 (&first)[kVectors],
                                                const VecF32 (&second)[kVectors], bool over_keys,
                                                bool over_queries) const {
    if (over_keys) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
        store(by_keys + i / 2 * kPureStride + j + v * kLanes<Pair>, zip(first[v], second[v]));
    }
    if (over_queries) {
      set_row(i, j, first);
      set_row(i + 1, j, second);
    }
  }

  // to (queries, columns) += X b, b in pairs of keys, (pairs of keys, columns) ...
  void add_to_queries(int64_t keys, int64_t queries, const Pair* b, int64_t columns, float* to) const {
    add_product(queries, columns, ceil_div(keys, 2), by_keys, 1, kPureStride, b, columns, to, columns);
  }
  // ... and to (keys, columns) += X^T b, b in pairs of queries.
  void add_to_keys(int64_t keys, int64_t queries, const Pair* b, int64_t columns, float* to) const {
    add_product(keys, columns, ceil_div(queries, 2), by_queries, kPureStride / 2, 1, b, columns, to, columns);
  }

 private:
  template <int kVectors> INFSA_INLINE void set_row(int64_t i, int64_t j, const VecF32 (&x)[kVectors]) const {
    const VecU32 joined = join(x[0], x[kVectors - 1]);
    __builtin_memcpy(by_queries + (i * kPureStride + j) / 2, &joined, kVectors * sizeof(joined) / 2);
  }
};

// The working memory of one thread. Columns: d and d_v padded to whole vectors.
struct PairScratch {
  int64_t depth, depth_v, columns, columns_v;  // pairs of a row that count, and columns
  int64_t row, row_v;                          // pairs from row to row
  Pair *q_rows, *query_rows;                   // of the queries' block: q, and dout or v
  Pair *q_panels, *g_panels;                   // queries along the vector: q, and dout; behind dout_i v_i when k is q
  Pair *k_rows, *v_rows;                       // of the keys' block: k, and v; behind v_j stands dout_j when k is q
  Pair *q_pairs, *k_pairs;                     // right sides of products, in pairs of tokens: q and k,
  Pair *query_pairs, *key_pairs;               // and v of the forward or dout of the backward, of queries and of keys
  PairBlock p, ds;
  float* squares;  // sum_j P_ij^2
  Arena arena;

  PairScratch(const PureHead& h, bool backward, void* memory)
      : depth(ceil_div(h.d, 2)),
        depth_v(ceil_div(h.d_v, 2)),
        columns(row_length<float>(h.d)),
        columns_v(row_length<float>(h.d_v)),
        row(row_length<Pair>(depth)),
        row_v(row_length<Pair>(depth_v)),
        arena(memory) {
    // A tile of rows reads on to its end, a vector of queries to the end of its panel.
    const int64_t queries = least(round_up(kPureStride, kPanel<Pair>), round_up(h.N, kPanel<Pair>));
    const int64_t keys = least(kPureStride, round_up(h.M, kTileRows)), sides = backward && h.tied ? 2 : 1;
    const auto block = [&](bool wanted) {
      return PairBlock{arena.take<Pair>(wanted ? keys / 2 * kPureStride + kTileRows : 0),
                       arena.take<Pair>(wanted ? keys * kPureStride / 2 : 0)};
    };
    q_rows = arena.take<Pair>(queries * row);
    q_panels = arena.take<Pair>(queries * depth);
    k_rows = arena.take<Pair>(keys * row);
    v_rows = arena.take<Pair>(keys * row_v * sides);
    query_rows = arena.take<Pair>(queries * row_v);
    query_pairs = arena.take<Pair>(queries / 2 * columns_v);
    key_pairs = arena.take<Pair>(keys / 2 * columns_v);
    g_panels = arena.take<Pair>(backward ? queries * row_v * sides : 0);
    q_pairs = arena.take<Pair>(backward ? queries / 2 * columns : 0);
    k_pairs = arena.take<Pair>(backward ? keys / 2 * columns : 0);
    p = block(true);
    ds = block(backward);
    squares = arena.take<float>(queries);
  }
  int64_t bytes() const { return arena.bytes; }
};

// Tokens [begin, begin + count) times unit, a power of two, as rows of pairs `stride` apart: 0 behind their ends.
INFSA_INLINE void load_pairs(const Tokens& from, int64_t begin, int64_t count, int64_t columns, float unit, Pair* to,
                             int64_t stride) {
  constexpr int64_t lanes = kLanes<float>;
  const int64_t padded = round_up(ceil_div(columns, 2), kLanes<Pair>) * 2;
  for (int64_t r = 0; r < count; ++r) {
    const bf16* row = row_of<bf16>(from, begin + r);
    bf16* pairs = reinterpret_cast<bf16*>(to + r * stride);
    int64_t c = 0;
    if (from.channel == 1 && unit == 1) {
      for (; c + lanes <= columns; c += lanes) __builtin_memcpy(pairs + c, row + c, lanes * sizeof(bf16));
    }
    for (; c < padded; c += lanes) {
      bf16 some[lanes] = {};
      for (int64_t i = 0; i < least(lanes, columns - c); ++i) some[i] = row[(c + i) * from.channel];
      store(pairs + c, load(some) * unit);
    }
  }
}

// The same rows in pairs of rows, (pairs of tokens, columns). A missing row is 0.
INFSA_INLINE void pair_rows(const Pair* rows, int64_t stride, int64_t count, int64_t columns, Pair* to) {
  for (int64_t r = 0; r < count; r += 2, rows += 2 * stride, to += columns) {
    const bf16 *first = reinterpret_cast<const bf16*>(rows), *second = reinterpret_cast<const bf16*>(rows + stride);
    for (int64_t c = 0; c < columns; c += kLanes<Pair>) {
      const VecU32 low = bit_cast<VecU32>(load(first + c)) >> 16;
      store(to + c, r + 1 < count ? low | bit_cast<VecU32>(load(second + c)) : low);
    }
  }
}

// P^T = ReLU(scale k q^T) of one block, over keys and where `twice` over queries; sum_j P_ij^2 of query i is added to
// squares[i].
INFSA_INLINE void make_pair_scores(const PairScratch& s, int64_t keys, int64_t queries, float scale, bool twice) {
  each_tile(keys, queries, s.depth, s.k_rows, s.row, s.q_panels, kPanel<Pair> * s.depth,
            [&](auto& c, int64_t i, int64_t j, int64_t rows) INFSA_LAMBDA {
              constexpr int vectors = sizeof(c[0]) / sizeof(c[0][0]);
              VecF32 sum[vectors] = {};
#pragma GCC unroll 6
              for (int r = 0; r < kTileRows; r += 2) {
                if (r >= rows) break;
                const bool both = r + 1 < rows;
#pragma GCC unroll 2
                for (int v = 0; v < vectors; ++v) {
                  c[r][v] = relu(c[r][v]) * scale;
                  c[r + 1][v] = both ? relu(c[r + 1][v]) * scale : VecF32{};
                  sum[v] += c[r][v] * c[r][v];
                  sum[v] += c[r + 1][v] * c[r + 1][v];
                }
                s.p.set(i + r, j, c[r], c[r + 1], true, twice);
              }
              for (int v = 0; v < vectors; ++v) {
                float* at = s.squares + j + v * kLanes<float>;
                store(at, load(at) + sum[v]);
              }
            });
}

INFSA_INLINE double pure_forward_in_pairs(const PureHead& h, const PureSums& sums, Range keys, Range queries,
                                          bool mirrored, void* memory) {
  const PairScratch s(h, false, memory);
  const auto out = [&](int64_t token) { return static_cast<float*>(sums.out) + token * s.columns_v; };
  const auto load_v = [&](int64_t begin, int64_t count, Pair* rows, Pair* pairs) {
    load_pairs(h.v, begin, count, h.d_v, float(h.unit.v), rows, s.row_v);
    pair_rows(rows, s.row_v, count, s.columns_v, pairs);
  };
  // In a chunk met by itself, the blocks below the diagonal mirror those above it.
  const bool diagonal = h.tied && !mirrored;
  double total = 0;
  for (int64_t i = queries.begin, rows; i < queries.end; i += rows) {
    rows = pure_block(queries.end - i);
    load_pairs(h.q, i, rows, h.d, float(h.unit.q), s.q_rows, s.row);
    make_panels(s.q_rows, s.row, rows, s.depth, Pair(1), s.q_panels, kPanel<Pair> * s.depth);
    if (h.tied) load_v(i, rows, s.query_rows, s.query_pairs);
    const int64_t key_end = diagonal ? i + rows : keys.end;
    for (int64_t j = keys.begin, count; j < key_end; j += count) {
      count = pure_block(key_end - j);
      const bool twice = h.tied && j != i;
      load_pairs(h.k, j, count, h.d, float(h.unit.k), s.k_rows, s.row);
      load_v(j, count, s.v_rows, s.key_pairs);
      for (int64_t r = 0; r < rows; ++r) s.squares[r] = 0;
      make_pair_scores(s, count, rows, float(1.0 / h.d), twice);
      s.p.add_to_queries(count, rows, s.key_pairs, s.columns_v, out(i));
      if (twice) s.p.add_to_keys(count, rows, s.query_pairs, s.columns_v, out(j));
      // float32 holds no longer sum than one query's over one block.
      double square = 0;
      for (int64_t r = 0; r < rows; ++r) square += s.squares[r];
      total += twice ? 2 * square : square;
    }
  }
  return total;
}

// P^T / (F + eps), and dS^T = [P > 0] (g_scale v dout^T - c P) where kScores, of one block. A NaN score keeps its NaN.
template <bool kScores>
void make_pair_gradients(const PairScratch& s, const PureHead& h, int64_t keys, int64_t queries, bool twice) {
  const float scale = float(1.0 / h.d), share = float(h.inverse_norm), g_scale = float(h.rho * h.inverse_norm / h.d);
  const float c = float((twice ? 2 : 1) * h.c / h.d);
  const int64_t depth = twice ? s.row_v + s.depth_v : s.depth_v, panel = h.tied ? s.row_v + s.depth_v : s.depth_v;
  const int64_t stride = h.tied ? 2 * s.row_v : s.row_v;
  each_tile(keys, queries, s.depth, s.k_rows, s.row, s.q_panels, kPanel<Pair> * s.depth,
            [&](auto& p, int64_t i, int64_t j, int64_t rows) INFSA_LAMBDA {
              constexpr int vectors = sizeof(p[0]) / sizeof(p[0][0]);
              VecF32 pair[2][vectors];
              const auto each_pair = [&](const PairBlock& to, bool over_keys, const auto& of) INFSA_LAMBDA {
#pragma GCC unroll 6
                for (int r = 0; r < kTileRows; r += 2) {
                  if (r >= rows) break;
#pragma GCC unroll 2
                  for (int v = 0; v < vectors; ++v) {
                    pair[0][v] = of(r, v);
                    pair[1][v] = r + 1 < rows ? of(r + 1, v) : VecF32{};
                  }
                  to.set(i + r, j, pair[0], pair[1], over_keys, true);
                }
              };
              each_pair(s.p, twice, [&](int r, int v) INFSA_LAMBDA {
                p[r][v] = relu(p[r][v]) * scale;
                return p[r][v] * share;
              });
              if constexpr (kScores) {
                row_tile<vectors, false>(s.v_rows + i * stride, stride, s.g_panels + j * panel, depth,
                                         [&](auto& g) INFSA_LAMBDA {
                                           each_pair(s.ds, true, [&](int r, int v) INFSA_LAMBDA {
                                             return p[r][v] <= 0 ? VecF32{} : g[r][v] * g_scale - c * p[r][v];
                                           });
                                         });
              }
            });
}

// As pure_backward, but that 1 / (F + eps) goes into P and not into dout, which stays as it is.
INFSA_INLINE void pure_backward_in_pairs(const PureHead& h, const PureSums& sums, Range keys, Range queries,
                                         bool mirrored, void* memory) {
  const PairScratch s(h, true, memory);
  void* dk_sums = h.tied ? sums.dq : sums.dk;
  const auto dq = [&](int64_t token) { return static_cast<float*>(sums.dq) + token * s.columns; };
  const auto dk = [&](int64_t token) { return static_cast<float*>(dk_sums) + token * s.columns; };
  const auto dv = [&](int64_t token) { return static_cast<float*>(sums.dv) + token * s.columns_v; };
  const bool diagonal = h.tied && !mirrored;
  const int64_t panel = kPanel<Pair> * (h.tied ? s.row_v + s.depth_v : s.depth_v);
  const int64_t v_stride = h.tied ? 2 * s.row_v : s.row_v;
  for (int64_t i = queries.begin, rows; i < queries.end; i += rows) {
    rows = pure_block(queries.end - i);
    load_pairs(h.q, i, rows, h.d, float(h.unit.q), s.q_rows, s.row);
    make_panels(s.q_rows, s.row, rows, s.depth, Pair(1), s.q_panels, kPanel<Pair> * s.depth);
    pair_rows(s.q_rows, s.row, rows, s.columns, s.q_pairs);
    if (h.tied) {
      load_pairs(h.v, i, rows, h.d_v, float(h.unit.v), s.query_rows, s.row_v);
      make_panels(s.query_rows, s.row_v, rows, s.depth_v, Pair(1), s.g_panels + s.row_v * kPanel<Pair>, panel);
    }
    load_pairs(h.dout, i, rows, h.d_v, float(h.unit.dout), s.query_rows, s.row_v);
    make_panels(s.query_rows, s.row_v, rows, h.tied ? s.row_v : s.depth_v, Pair(1), s.g_panels, panel);
    pair_rows(s.query_rows, s.row_v, rows, s.columns_v, s.query_pairs);
    const int64_t key_end = diagonal ? i + rows : keys.end;
    for (int64_t j = keys.begin, count; j < key_end; j += count) {
      count = pure_block(key_end - j);
      const bool twice = h.tied && j != i;
      load_pairs(h.k, j, count, h.d, float(h.unit.k), s.k_rows, s.row);
      load_pairs(h.v, j, count, h.d_v, float(h.unit.v), s.v_rows, v_stride);
      if (twice) {
        Pair* dout_rows = s.v_rows + s.row_v;
        load_pairs(h.dout, j, count, h.d_v, float(h.unit.dout), dout_rows, v_stride);
        pair_rows(dout_rows, v_stride, count, s.columns_v, s.key_pairs);
      }
      sums.dq || dk_sums ? make_pair_gradients<true>(s, h, count, rows, twice)
                         : make_pair_gradients<false>(s, h, count, rows, twice);
      // d(P v): out += P v, and its mirror.
      if (sums.dv) s.p.add_to_keys(count, rows, s.query_pairs, s.columns_v, dv(j));
      if (sums.dv && twice) s.p.add_to_queries(count, rows, s.key_pairs, s.columns_v, dv(i));
      // d(ReLU), d(F): P = ReLU(k q^T).
      if (dk_sums) s.ds.add_to_keys(count, rows, s.q_pairs, s.columns, dk(j));
      if (sums.dq) {
        pair_rows(s.k_rows, s.row, count, s.columns, s.k_pairs);
        s.ds.add_to_queries(count, rows, s.k_pairs, s.columns, dq(i));
      }
    }
  }
}

// Few scores average no rounding, and few columns are not multiplied at all: those go without pairs.
INFSA_INLINE bool in_pairs(const PureHead& h) { return !(h.few_keys || h.few_columns || h.few_scores); }

constexpr PureKernels pure_kernels_in_pairs() {
  return {
      [](const PureHead& h, bool backward) {
        const int64_t without = PureScratch<float>(h, backward, nullptr).bytes();
        const int64_t bytes = PairScratch(h, backward, nullptr).bytes();
        return bytes < without ? without : bytes;
      },
      [](const PureHead& h, const PureSums& sums, Range keys, Range queries, bool mirrored, void* memory) {
        return in_pairs(h) ? pure_forward_in_pairs(h, sums, keys, queries, mirrored, memory)
                           : pure_forward<bf16>(h, sums, keys, queries, mirrored, memory);
      },
      [](const PureHead& h, const PureSums& sums, Range keys, Range queries, bool mirrored, void* memory) {
        in_pairs(h) ? pure_backward_in_pairs(h, sums, keys, queries, mirrored, memory)
                    : pure_backward<bf16>(h, sums, keys, queries, mirrored, memory);
      },
  };
}

}  // namespace infsa::cpu::INFSA_ISA
