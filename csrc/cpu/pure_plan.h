// How pure.cpp cuts the work of a call: the cells of a head's score matrix (key chunk, query chunk), the rounds of
// cells that share no chunk, and the heads whose sums are in memory at once; and the units of measure of its heads. The
// cut and the order of the rounds depend on sizes alone: the same bits for any number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "isa.h"
#include "memory.h"
#include "range.h"
#include "tasks.h"

namespace infsa::cpu::pure {

// The sums of the heads in flight, unless one head alone needs more.
constexpr int64_t kSumsBytes = 32 << 20;
// A head whose sums are at most this is left to one thread, which keeps them in its L2, when there are heads for all.
constexpr int64_t kOwnSumsBytes = 1 << 20;
// The cells that a round should have, for machines with many cores. Twice as many cost a forward nothing on two cores,
// and a backward 3 to 5%.
constexpr int64_t kForwardCells = 64, kBackwardCells = 32;

// What forward and backward have in common.
struct Call {
  const Sizes size;
  const Tensor &q, &k, &v;
  const double rho;
  const OptTensor& head_rho;
  const Kept queries, keys;
  const bool tied;       // k is q
  const bool symmetric;  // and the same tokens count on both sides
  const bool partial;    // some outputs are not written by the kernels: they start as 0
  const Kernels& kernels;
  const bool wide;               // the accumulation type is double
  std::vector<PureUnits> units;  // of the heads, once one needs them
  bool whole = true;             // no other keys and queries share its F and c

  Call(const Sizes& size, const Tensor& q, const OptTensor& k, const Tensor& v, double rho, const OptTensor& head_rho,
       Kept queries, Kept keys, bool same_tokens, bool masked)
      : size(size),
        q(q),
        k(k ? *k : q),
        v(v),
        rho(rho),
        head_rho(head_rho),
        queries(std::move(queries)),
        keys(std::move(keys)),
        tied(!k),
        symmetric(tied && same_tokens),
        partial(masked || empty()),
        kernels(kernels_for(q.dtype())),
        wide(acc_dtype(q) == kDouble) {}

  int64_t heads() const { return size.B * size.H; }
  bool empty() const { return heads() * size.N * size.M * size.d == 0; }

  Tokens tokens(const Tensor& t, int64_t head, const Kept& kept) const {
    return tokens_of(rows_of(t), head / size.H, head % size.H, t.element_size(), kept.of(head / size.H));
  }

  PureHead head(int64_t index) const {
    const int64_t b = index / size.H;
    PureHead p{};
    p.N = queries.count(b), p.M = keys.count(b), p.d = size.d, p.d_v = size.d_v;
    p.q = tokens(q, index, queries), p.k = tokens(k, index, keys), p.v = tokens(v, index, keys);
    p.tied = symmetric, p.rho = rho_of(rho, head_rho, b, index % size.H);
    p.few_keys = p.M <= kFewKeys, p.few_columns = p.d_v <= kFewColumns;
    p.few_scores = whole && std::max(p.N, p.M) <= kPureStride && p.N * p.M <= kFewScores;
    if (!units.empty()) p.unit = units[index];
    return p;
  }

  bool is_factor(double x) const { return within(x, kMostFactor, wide); }
  bool is_sum(double x) const { return within(x, kMostSum, wide); }

  // Brings q, k and v of a head to order one, and g = dout / norm where given. False where that is no help: one is not
  // finite.
  bool scale_head(int64_t index, const Tensor* dout = nullptr, double norm = 1) {
    PureHead p = head(index);
    const auto unit = [&](const Tokens& t, int64_t rows, int64_t columns) {
      return unit_of(kernels.tokens.largest(t, columns, {0, rows}), wide);
    };
    PureUnits u{unit(p.q, p.N, p.d), unit(p.k, p.M, p.d), unit(p.v, p.M, p.d_v), 1};
    if (dout) u.dout = unit(tokens(*dout, index, queries), p.N, p.d_v) * std::ldexp(1, std::ilogb(norm * u.q * u.k));
    if (u.q * u.k * u.v * u.dout == 0) return false;
    units.resize(heads());
    units[index] = u;
    return true;
  }
};

// Cells of a head: n query chunks; as many key chunks and rounds, or one.
struct Cut {
  int64_t n, rounds;
};

inline Cut cut(const Call& call, int64_t head_bytes, int64_t cells, bool queries_only) {
  const auto blocks = [](int64_t tokens) {
    return 1 + ceil_div(std::max<int64_t>(tokens - kPureStride, 0), kPureBlock);
  };
  if (queries_only) return {blocks(call.size.N), 1};
  const int64_t together = std::clamp<int64_t>(kSumsBytes / std::max<int64_t>(head_bytes, 1), 1, call.heads());
  // A round of a symmetric head has half as many cells as chunks.
  const int64_t wanted = ceil_div(call.symmetric ? 2 * cells : cells, together);
  const int64_t n = std::min(wanted, blocks(std::max(call.size.N, call.size.M)));
  return {n, n};
}

// The i-th of n chunks: whole blocks, with the slack that the last block may take.
inline Range chunk(int64_t tokens, int64_t n, int64_t i) {
  const int64_t step = ceil_div(ceil_div(tokens, n), kPureBlock) * kPureBlock;
  const auto bound = [&](int64_t at) { return at > 0 && at * step + kPureSlack >= tokens ? tokens : at * step; };
  return {bound(i), bound(i + 1)};
}

// For every head of a range: begin(head, chunk), then cell(head, round, query chunk, key chunk, sums, scratch) round by
// round, then end(head, chunk, sums).
template <typename Begin, typename Cell, typename End>
void run_heads(const Call& call, Range range, Cut cut, int64_t head_bytes, bool backward, const Begin& begin,
               const Cell& cell, const End& end) {
  const auto [n, rounds] = cut;
  const int64_t heads = range.end - range.begin;
  PureHead largest = call.head(0);
  largest.N = call.size.N, largest.M = call.size.M;
  const int64_t scratch = call.kernels.pure.scratch_bytes(largest, backward);
  const double head_work = double(call.size.N) * call.size.M * (call.size.d + call.size.d_v);
  const auto run_cell = [&](int64_t head, int64_t round, int64_t i, char* sums, char* memory) {
    // The pairs i + j = round (mod n): every chunk is in one cell of a round, of which a symmetric head needs one half.
    const int64_t j = rounds == 1 ? i : (round - i + n) % n;
    if (!call.symmetric || i <= j) cell(head, round, i, j, sums, memory);
  };

  if (head_bytes <= kOwnSumsBytes && heads >= get_num_threads()) {
    run_tasks(heads, heads * head_work, scratch + head_bytes, [&](int64_t task, char* memory) {
      const int64_t head = range.begin + task;
      char* sums = memory + scratch;
      for (int64_t i = 0; i < n; ++i) begin(head, i);
      for (int64_t round = 0; round < rounds; ++round) {
        for (int64_t i = 0; i < n; ++i) run_cell(head, round, i, sums, memory);
      }
      for (int64_t i = 0; i < n; ++i) end(head, i, sums);
    });
    return;
  }
  const int64_t together = std::clamp<int64_t>(kSumsBytes / std::max<int64_t>(head_bytes, 1), 1, heads);
  const Buffer all_sums(together * head_bytes);
  for (int64_t first = range.begin; first < range.end; first += together) {
    const int64_t tasks = std::min(together, range.end - first) * n;
    const double work = tasks / n * head_work;
    const auto sums = [&](int64_t task) { return all_sums.data() + task / n * head_bytes; };
    run_tasks(tasks, work, 0, [&](int64_t task, char*) { begin(first + task / n, task % n); });
    for (int64_t round = 0; round < rounds; ++round) {
      run_tasks(tasks, work, scratch,
                [&](int64_t task, char* memory) { run_cell(first + task / n, round, task % n, sums(task), memory); });
    }
    run_tasks(tasks, work, 0, [&](int64_t task, char*) { end(first + task / n, task % n, sums(task)); });
  }
}

}  // namespace infsa::cpu::pure
