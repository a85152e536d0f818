// The pooled layer's two operators on the CPU, a block of tokens at a time: loaded, normalised, multiplied by packed
// matrices, and reduced while the results are still in cache. Equations and gradients: docs/pooled_linear.md.
//
// Included by isa_<set>.cpp only.
#pragma once

#include "gemm.h"
#include "layer.h"

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

class Memory {
 public:
  explicit Memory(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}
  template <typename A> A* take(int64_t n) {
    A* part = reinterpret_cast<A*>(base_ + bytes);
    bytes += round_up(n * int64_t(sizeof(A)), 64);
    return part;
  }
  int64_t bytes = 0;

 private:
  uintptr_t base_;
};

// The first n lanes (n may be more than there are), 0 elsewhere.
template <typename A> INFSA_INLINE Vec<A> keep_first(Vec<A> v, int64_t n) {
  Vec<A> lane;
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = A(i);
  return lane < A(n) ? v : Vec<A>{};
}

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
  constexpr int64_t kColumns = 4 * kPanel<A>;  // at a time
  A part[kPanel<A> * kColumns];
  for (int64_t p = range.begin; p < range.end; ++p) {
    const int64_t first = p * kPanel<A>, count = least(rows - first, kPanel<A>);
    for (int64_t c = 0; c < columns; c += kColumns) {
      const int64_t width = least(columns - c, kColumns);
      const Tokens corner{static_cast<T*>(from.data) + c * from.col, from.row, from.col, nullptr};
      copy_rows<T>(corner, first, count, width, A(1), part, kColumns);
      // make_panels leaves out the second vector of a panel that has rows for one only.
      A* panel = static_cast<A*>(panels) + (first * columns + c * kPanel<A>);
      make_panels(part, kColumns, count, width, A(1), panel, 0);
      if (!packed_columns) continue;
      for (int64_t j = 0; j < width; j += kPanel<A>) {
        A* to = static_cast<A*>(packed_columns) + (c + j) * rows + first * kPanel<A>;
        for (int64_t r = 0; r < count; ++r) {
          for (int64_t v = 0; v < least(round_up(width - j, kLanes<A>), kPanel<A>); v += kLanes<A>)
            store(to + r * kPanel<A> + v, load(part + r * kColumns + j + v));
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

  Block(const LayerTokens& t, Memory& memory)
      : stride(row_stride<A>(t.D)),
        rows(memory.take<A>(padded_rows<A>(token_block<A>(t.D)) * stride)),
        inverse(memory.take<A>(token_block<A>(t.D))) {}

  void load_tokens(const LayerTokens& t, int64_t begin, int64_t count) {
    copy_rows<T>(t.x, begin, count, t.D, A(1), rows, stride);
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
  void store_gradient(const LayerTokens& t, int64_t begin, int64_t count, A* gradient) const {
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

template <typename T> struct QueryScratch {
  using A = Acc<T>;
  int64_t stride;
  Block<T> block;
  A *queries, *energy, *along, *dx;

  QueryScratch(const LayerTokens& t, int64_t columns, bool backward, Memory& memory)
      : stride(row_stride<A>(columns)), block(t, memory) {
    const int64_t tokens = padded_rows<A>(token_block<A>(t.D));
    queries = memory.take<A>(tokens * stride + kTileRows);
    energy = memory.take<A>(tokens);
    along = memory.take<A>(tokens);
    dx = memory.take<A>(backward ? tokens * block.stride : 0);
  }
};

// Channels that are whole heads and whole panels: as many as are projected before they are reduced.
template <typename A> int64_t head_group(int64_t C, int64_t d) {
  int64_t group = kPanel<A>;
  while (group < C && group % d) group += kPanel<A>;
  return group;
}

// Channels c.. of a head's query, 0 beyond the head.
template <typename A> INFSA_INLINE Vec<A> head_channels(const A* query, const A* bias, int64_t c, int64_t d) {
  const Vec<A> y = load(query + c) + load(bias + c);
  return c + kLanes<A> <= d ? y : keep_first<A>(y, d - c);
}

template <typename T>
void query_forward(const LayerTokens& t, const QueryArgs& q, Range range, double* sums, void* memory) {
  using A = Acc<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t C = q.H * q.d, group = head_group<A>(C, q.d);
  Memory parts(memory);
  QueryScratch<T> s(t, group, false, parts);
  for (int64_t begin = range.begin; begin < range.end; begin += t.block) {
    const int64_t count = least(range.end - begin, t.block);
    s.block.load_tokens(t, begin, count);
    for (int64_t first = 0; first < C; first += group) {
      const int64_t channels = least(C - first, group);
      multiply(count, t.D, s.block.rows, s.block.stride, static_cast<const A*>(q.panels) + first * t.D, channels,
               s.queries, s.stride);
      for (int64_t c = first; c < first + channels; c += q.d) {
        const A *queries = s.queries + (c - first), *bias = static_cast<const A*>(q.bias) + c;
        Vec<A> energies = {};
        for (int64_t i = 0; i < count; i += lanes) {
          const Vec<A> squares = sum_rows<A>([&](int64_t r) INFSA_LAMBDA {
            Vec<A> sum = {};
            for (int64_t k = 0; k < q.d; k += lanes) {
              const Vec<A> y = head_channels(queries + (i + r) * s.stride, bias, k, q.d);
              sum += y * y;
            }
            return sum;
          });
          const Vec<A> energy = keep_first<A>(sqrt(squares), count - i);
          store(s.energy + i, energy);
          energies += energy;
        }
        sums[C + c / q.d] += double(sum_lanes(energies));
        for (int64_t k = 0; k < q.d; k += lanes) {
          Vec<A> sum = {};
          for (int64_t i = 0; i < count; ++i) sum += s.energy[i] * head_channels(queries + i * s.stride, bias, k, q.d);
          for (int64_t l = 0; l < least(lanes, q.d - k); ++l) sums[c + k + l] += double(sum[l]);
        }
      }
    }
  }
}

// In place of y = W x^ + b: dy = ||y|| g + (y . g - offset) y / ||y||, the second term 0 where y is.
template <typename T> void query_gradients(const QueryArgs& q, int64_t count, const QueryScratch<T>& s) {
  using A = Acc<T>;
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t h = 0; h < q.H; ++h) {
    A* queries = s.queries + h * q.d;
    const A *bias = static_cast<const A*>(q.bias) + h * q.d, *g = static_cast<const A*>(q.gradient) + h * q.d;
    const A offset = static_cast<const A*>(q.offset)[h];
    for (int64_t i = 0; i < count; i += lanes) {
      const auto sums = [&](const auto& other) INFSA_LAMBDA {
        return sum_rows<A>([&](int64_t r) INFSA_LAMBDA {
          Vec<A> sum = {};
          for (int64_t k = 0; k < q.d; k += lanes) {
            const Vec<A> y = head_channels(queries + (i + r) * s.stride, bias, k, q.d);
            sum += y * other(y, k);
          }
          return sum;
        });
      };
      const Vec<A> energy = sqrt(sums([](Vec<A> y, int64_t) INFSA_LAMBDA { return y; }));
      const Vec<A> dot = sums([&](Vec<A>, int64_t k) INFSA_LAMBDA { return load(g + k); });
      store(s.energy + i, energy);
      store(s.along + i, energy > A(0) ? (dot - offset) / energy : Vec<A>{});
    }
    for (int64_t i = 0; i < count; ++i) {
      A* query = queries + i * s.stride;
      for (int64_t k = 0; k < q.d; k += lanes) {
        const Vec<A> dy = s.energy[i] * load(g + k) + s.along[i] * (load(query + k) + load(bias + k));
        if (k + lanes <= q.d)
          store(query + k, dy);
        else
          store_first(query + k, dy, q.d - k);
      }
    }
  }
}

template <typename T>
void query_backward(const LayerTokens& t, const QueryArgs& q, Range range, const Wave& wave, int64_t at, void* memory) {
  using A = Acc<T>;
  const int64_t C = q.H * q.d, count = range.end - range.begin;
  Memory parts(memory);
  QueryScratch<T> s(t, C, true, parts);
  Block<T>& block = s.block;
  block.load_tokens(t, range.begin, count);
  multiply(count, t.D, block.rows, block.stride, static_cast<const A*>(q.panels), C, s.queries, s.stride);
  query_gradients(q, count, s);
  if (wave.query_tiles) {
    for (int64_t c = 0; c < C; c += kTileRows) {
      A* to = static_cast<A*>(wave.query_tiles) + c * wave.tokens + at * kTileRows;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t r = 0; r < kTileRows; ++r) to[i * kTileRows + r] = s.queries[i * s.stride + c + r];
      }
    }
  }
  if (wave.token_panels) {
    for (int64_t c = 0; c < t.D; c += kPanel<A>) {
      A* to = static_cast<A*>(wave.token_panels) + c * wave.tokens + at * kPanel<A>;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t v = 0; v < kPanel<A>; v += kLanes<A>)
          store(to + i * kPanel<A> + v, load(block.rows + i * block.stride + c + v));
      }
    }
  }
  if (!t.dx.data) return;
  multiply(count, C, s.queries, s.stride, static_cast<const A*>(q.columns), t.D, s.dx, block.stride);
  block.store_gradient(t, range.begin, count, s.dx);
}

template <typename T> void weight_gradient(const Wave& wave, int64_t tokens, int64_t C, int64_t D, Range tiles,
                                           int64_t panel, void* dweight) {
  using A = Acc<T>;
  const int64_t stride = round_up(D, kPanel<A>), column = panel * kPanel<A>;
  const A* panels = static_cast<const A*>(wave.token_panels) + column * wave.tokens;
  for (int64_t k = 0; k < tokens; k += kDepth) {
    for (int64_t i = tiles.begin; i < tiles.end; ++i) {
      const int64_t c = i * kTileRows;
      add_columns<kTileVectors>(least(C - c, kTileRows), least(tokens - k, kDepth),
                                static_cast<const A*>(wave.query_tiles) + c * wave.tokens + k * kTileRows, 1, kTileRows,
                                panels + k * kPanel<A>, kPanel<A>, static_cast<A*>(dweight) + c * stride + column,
                                stride);
    }
  }
}

template <typename A> void bias_gradient(const Wave& wave, int64_t tokens, int64_t C, Range tiles, double* dbias) {
  for (int64_t i = tiles.begin; i < tiles.end; ++i) {
    const int64_t c = i * kTileRows;
    const A* from = static_cast<const A*>(wave.query_tiles) + c * wave.tokens;
    for (int64_t k = 0; k < tokens; k += kDepth) {
      A sum[kTileRows] = {};
      for (int64_t l = k; l < least(tokens, k + kDepth); ++l) {
        for (int64_t r = 0; r < kTileRows; ++r) sum[r] += from[l * kTileRows + r];
      }
      for (int64_t r = 0; r < least(C - c, kTileRows); ++r) dbias[c + r] += double(sum[r]);
    }
  }
}

template <typename T> struct ScoreScratch {
  using A = Acc<T>;
  int64_t wide, stride;  // heads in whole vectors, and the elements between two tokens' scores
  Block<T> block;
  A *scores, *dx;

  ScoreScratch(const LayerTokens& t, int64_t H, bool backward, Memory& memory)
      : wide(round_up(H, kLanes<A>)), stride(row_stride<A>(backward ? 2 * wide : wide)), block(t, memory) {
    const int64_t tokens = padded_rows<A>(token_block<A>(t.D));
    scores = memory.take<A>(tokens * stride);
    dx = memory.take<A>(backward ? tokens * block.stride : 0);
  }
};

// to (H, D) += scores^T x^, and sums (H) += the sums of the scores.
template <typename T>
void add_to_heads(const ScoreScratch<T>& s, int64_t count, int64_t H, int64_t D, void* to, double* sums) {
  using A = Acc<T>;
  const Block<T>& block = s.block;
  if (to) {
    add_product(H, round_up(D, kLanes<A>), count, s.scores, 1, s.stride, block.rows, block.stride, static_cast<A*>(to),
                round_up(D, kPanel<A>));
  }
  for (int64_t h = 0; h < H && sums; h += kLanes<A>) {
    Vec<A> sum = {};
    for (int64_t i = 0; i < count; ++i) sum += load(s.scores + i * s.stride + h);
    for (int64_t l = 0; l < least(kLanes<A>, H - h); ++l) sums[h + l] += double(sum[l]);
  }
}

template <typename T> void score_forward(const LayerTokens& t, const ScoreArgs& a, Range range, void* weighted,
                                         double* score_sum, void* memory) {
  using A = Acc<T>;
  Memory parts(memory);
  ScoreScratch<T> s(t, a.H, false, parts);
  for (int64_t begin = range.begin; begin < range.end; begin += t.block) {
    const int64_t count = least(range.end - begin, t.block);
    s.block.load_tokens(t, begin, count);
    multiply(count, t.D, s.block.rows, s.block.stride, static_cast<const A*>(a.panels), s.wide, s.scores, s.stride);
    for (int64_t i = 0; i < count; ++i) {
      A* scores = s.scores + i * s.stride;
      for (int64_t h = 0; h < s.wide; h += kLanes<A>)
        store(scores + h, relu(load(scores + h) + load(static_cast<const A*>(a.bias) + h)));
    }
    add_to_heads(s, count, a.H, t.D, weighted, score_sum);
  }
}

// With [keys; g] of 2 P rows, g = dpooled / R:
//   dt = [t > 0] (x^ . g - offset)      dx^ = [dt, r] [keys; g]      dkeys = dt^T x^
template <typename T>
void score_backward(const LayerTokens& t, const ScoreArgs& a, Range range, void* dkeys, double* dbias, void* memory) {
  using A = Acc<T>;
  Memory parts(memory);
  ScoreScratch<T> s(t, a.H, true, parts);
  for (int64_t begin = range.begin; begin < range.end; begin += t.block) {
    const int64_t count = least(range.end - begin, t.block);
    s.block.load_tokens(t, begin, count);
    multiply(count, t.D, s.block.rows, s.block.stride, static_cast<const A*>(a.panels), 2 * s.wide, s.scores, s.stride);
    for (int64_t i = 0; i < count; ++i) {
      A* scores = s.scores + i * s.stride;
      for (int64_t h = 0; h < s.wide; h += kLanes<A>) {
        const Vec<A> score = relu(load(scores + h) + load(static_cast<const A*>(a.bias) + h));
        const Vec<A> gradient = load(scores + s.wide + h) - load(static_cast<const A*>(a.offset) + h);
        store(scores + h, keep_first<A>(score <= A(0) ? Vec<A>{} : gradient, a.H - h));
        store(scores + s.wide + h, keep_first<A>(score, a.H - h));
      }
    }
    add_to_heads(s, count, a.H, t.D, dkeys, dbias);
    if (!t.dx.data) continue;
    multiply(count, 2 * s.wide, s.scores, s.stride, static_cast<const A*>(a.columns), t.D, s.dx, s.block.stride);
    s.block.store_gradient(t, begin, count, s.dx);
  }
}

template <typename T> constexpr LayerKernels layer_kernels_of() {
  using A = Acc<T>;
  return {
      kLanes<A>,
      kPanel<A>,
      kTileRows,
      token_block<A>,
      pack<T>,
      pack<A>,
      [](int64_t D, int64_t C, bool backward) {
        Memory memory(nullptr);
        QueryScratch<T>({{}, {}, D, 0, false, 0}, C, backward, memory);
        return memory.bytes;
      },
      query_forward<T>,
      query_backward<T>,
      weight_gradient<T>,
      bias_gradient<A>,
      [](const Tokens& to, Range rows, int64_t columns, const void* sums, int64_t stride) {
        store_rows<T>(to, rows.begin, rows.end - rows.begin, columns, A(1),
                      static_cast<const A*>(sums) + rows.begin * stride, stride);
      },
      [](int64_t D, int64_t H, bool backward) {
        Memory memory(nullptr);
        ScoreScratch<T>({{}, {}, D, 0, false, 0}, H, backward, memory);
        return memory.bytes;
      },
      score_forward<T>,
      score_backward<T>,
  };
}

extern const LayerKernels layer_kernels[4] = {layer_kernels_of<float>(), layer_kernels_of<double>(),
                                              layer_kernels_of<bf16>(), layer_kernels_of<fp16>()};

}  // namespace infsa::cpu::INFSA_ISA
