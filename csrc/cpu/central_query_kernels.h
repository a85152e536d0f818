// infsa::central_query on the CPU, a block of tokens at a time. Equations and gradients: docs/pooled_linear.md.
//
// Included by isa_<set>.cpp only.
#pragma once

#include "central_query.h"
#include "image_block.h"

namespace infsa::cpu::INFSA_ISA {

template <typename T> struct QueryScratch {
  using A = Acc<T>;
  int64_t stride;
  Block<T> block;
  A *queries, *energy, *along, *dx;

  QueryScratch(const Image& t, int64_t columns, bool backward, Arena& arena)
      : stride(row_stride<A>(columns)), block(t, arena) {
    const int64_t tokens = padded_rows<A>(token_block<A>(t.D));
    queries = arena.take<A>(tokens * stride + kTileRows);
    energy = arena.take<A>(tokens);
    along = arena.take<A>(tokens);
    dx = arena.take<A>(backward ? tokens * block.stride : 0);
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

template <typename T> void query_forward(const Image& t, const QueryArgs& q, Range range, int64_t share, int64_t shares,
                                         double* sums, void* memory) {
  using A = Acc<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t C = q.H * q.d, group = head_group<A>(C, q.d), groups = round_up(C, group) / group;
  const int64_t from = share * groups / shares * group, to = least((share + 1) * groups / shares * group, C);
  if (from == to) return;
  Arena arena(memory);
  QueryScratch<T> s(t, group, false, arena);
  for (int64_t begin = range.begin; begin < range.end; begin += t.block) {
    const int64_t count = least(range.end - begin, t.block);
    s.block.load_tokens(t, begin, count);
    for (int64_t first = from; first < to; first += group) {
      const int64_t channels = least(to - first, group);
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
void query_backward(const Image& t, const QueryArgs& q, Range range, const Wave& wave, int64_t at, void* memory) {
  using A = Acc<T>;
  const int64_t C = q.H * q.d, count = range.end - range.begin;
  Arena arena(memory);
  QueryScratch<T> s(t, C, true, arena);
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

template <typename T> constexpr CentralQueryKernels central_query_kernels() {
  return {
      [](int64_t D, int64_t C, bool backward) {
        Arena arena(nullptr);
        QueryScratch<T>({{}, {}, D, 0, false, 0}, C, backward, arena);
        return arena.bytes;
      },
      query_forward<T>,
      query_backward<T>,
      weight_gradient<T>,
      bias_gradient<Acc<T>>,
  };
}

}  // namespace infsa::cpu::INFSA_ISA
