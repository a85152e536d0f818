// infsa::score_pool on the CPU, a block of tokens at a time. Equations and gradients: docs/pooled_linear.md.
//
// Included by isa_<set>.cpp only.
#pragma once

#include "image_block.h"
#include "score_pool.h"

namespace infsa::cpu::INFSA_ISA {

template <typename T> struct ScoreScratch {
  using A = Acc<T>;
  int64_t wide, stride;  // heads in whole vectors, and the elements between two tokens' scores
  Block<T> block;
  A *scores, *dx;

  ScoreScratch(const Image& t, int64_t H, bool backward, Arena& arena)
      : wide(round_up(H, kLanes<A>)), stride(row_stride<A>(backward ? 2 * wide : wide)), block(t, arena) {
    const int64_t tokens = padded_rows<A>(token_block<A>(t.D));
    scores = arena.take<A>(tokens * stride);
    dx = arena.take<A>(backward ? tokens * block.stride : 0);
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

// What a floor needs beside the scores: sum_j x^_j and, before they become scores, sum_j |t_j|.
template <typename T> void add_floor(const ScoreScratch<T>& s, const ScoreArgs& a, int64_t count, int64_t D,
                                     Acc<T>* token_sum, double* absolute_sum) {
  using A = Acc<T>;
  for (int64_t c = 0; c < D; c += kLanes<A>) {
    Vec<A> sum = {};
    for (int64_t i = 0; i < count; ++i) sum += load(s.block.rows + i * s.block.stride + c);
    store(token_sum + c, load(token_sum + c) + sum);
  }
  for (int64_t h = 0; h < a.H; h += kLanes<A>) {
    const Vec<A> bias = load(static_cast<const A*>(a.bias) + h);
    Vec<A> sum = {};
    for (int64_t i = 0; i < count; ++i) sum += abs(load(s.scores + i * s.stride + h) + bias);
    for (int64_t l = 0; l < least(kLanes<A>, a.H - h); ++l) absolute_sum[h + l] += double(sum[l]);
  }
}

template <typename T>
void score_forward(const Image& t, const ScoreArgs& a, Range range, const ScoreSums& sums, void* memory) {
  using A = Acc<T>;
  Arena arena(memory);
  ScoreScratch<T> s(t, a.H, false, arena);
  for (int64_t begin = range.begin; begin < range.end; begin += t.block) {
    const int64_t count = least(range.end - begin, t.block);
    s.block.load_tokens(t, begin, count);
    multiply(count, t.D, s.block.rows, s.block.stride, static_cast<const A*>(a.panels), s.wide, s.scores, s.stride);
    if (sums.floor)
      add_floor(s, a, count, t.D, static_cast<A*>(sums.rows) + a.H * round_up(t.D, kPanel<A>), sums.scores + a.H);
    for (int64_t i = 0; i < count; ++i) {
      A* scores = s.scores + i * s.stride;
      for (int64_t h = 0; h < s.wide; h += kLanes<A>)
        store(scores + h, relu(load(scores + h) + load(static_cast<const A*>(a.bias) + h)));
    }
    add_to_heads(s, count, a.H, t.D, sums.rows, sums.scores);
  }
}

// With [keys; g] of 2 P rows, g = dpooled / R:
//   dt = [t > 0] (x^ . g - offset)      dx^ = [dt, r] [keys; g]      dkeys = dt^T x^
// and with a floor c per head, whose gradient is m: dt += sign(t) m, and r + c in the place of r.
template <typename T, bool kFloor>
void score_backward(const Image& t, const ScoreArgs& a, Range range, void* dkeys, double* dbias, void* memory) {
  using A = Acc<T>;
  Arena arena(memory);
  ScoreScratch<T> s(t, a.H, true, arena);
  for (int64_t begin = range.begin; begin < range.end; begin += t.block) {
    const int64_t count = least(range.end - begin, t.block);
    s.block.load_tokens(t, begin, count);
    multiply(count, t.D, s.block.rows, s.block.stride, static_cast<const A*>(a.panels), 2 * s.wide, s.scores, s.stride);
    for (int64_t i = 0; i < count; ++i) {
      A* scores = s.scores + i * s.stride;
      for (int64_t h = 0; h < s.wide; h += kLanes<A>) {
        const Vec<A> product = load(scores + h) + load(static_cast<const A*>(a.bias) + h);
        Vec<A> score = relu(product);
        Vec<A> gradient = load(scores + s.wide + h) - load(static_cast<const A*>(a.offset) + h);
        gradient = score <= A(0) ? Vec<A>{} : gradient;
        if constexpr (kFloor) {
          gradient += sign(product) * load(static_cast<const A*>(a.floor_gradient) + h);
          score += load(static_cast<const A*>(a.floor) + h);
        }
        store(scores + h, keep_first<A>(gradient, a.H - h));
        store(scores + s.wide + h, keep_first<A>(score, a.H - h));
      }
    }
    add_to_heads(s, count, a.H, t.D, dkeys, dbias);
    if (!t.dx.data) continue;
    multiply(count, 2 * s.wide, s.scores, s.stride, static_cast<const A*>(a.columns), t.D, s.dx, s.block.stride);
    s.block.store_gradient(t, begin, count, s.dx);
  }
}

template <typename T> constexpr ScorePoolKernels score_pool_kernels() {
  return {
      [](int64_t D, int64_t H, bool backward) {
        Arena arena(nullptr);
        ScoreScratch<T>({{}, {}, D, 0, false, 0}, H, backward, arena);
        return arena.bytes;
      },
      score_forward<T>,
      [](const Image& t, const ScoreArgs& a, Range range, void* dkeys, double* dbias, void* memory) {
        a.floor ? score_backward<T, true>(t, a, range, dkeys, dbias, memory)
                : score_backward<T, false>(t, a, range, dkeys, dbias, memory);
      },
  };
}

}  // namespace infsa::cpu::INFSA_ISA
