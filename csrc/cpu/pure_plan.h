// How pure.cpp cuts the work of a call: the cells of a head's score matrix (key chunk, query chunk), the rounds of
// cells that share no chunk, and the heads whose sums are in memory at once; and the units of measure of its heads. The
// cut and the order in which a row of sums adds up blocks depend on sizes alone: the same bits for any number of
// threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>
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
// and a backward 3 to 5%: that one cuts its cells where there are more threads.
constexpr int64_t kForwardCells = 64, kBackwardCells = 32;
// Pieces of a round's cells that a thread should find, where there are more threads than cells.
constexpr int64_t kPiecesPerThread = 3;

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

  bool has_values(int64_t index) const {
    const PureHead p = head(index);
    return kernels.tokens.largest(p.v, p.d_v, {0, p.M}) != 0;
  }

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

// A cell of a round, or a piece of one: `pieces` x `pieces` of them are a cell, cut as a head is cut into cells.
struct Cell {
  int64_t round, i, j;               // chunk of queries, and of keys
  int64_t pieces = 1, a = 0, b = 0;  // piece of the chunk of queries, and of keys

  Range queries(int64_t N, int64_t n) const { return piece(chunk(N, n, i), a); }
  Range keys(int64_t M, int64_t n) const { return piece(chunk(M, n, j), b); }

 private:
  Range piece(Range whole, int64_t at) const {
    const Range part = chunk(whole.size(), pieces, at);
    return {whole.begin + part.begin, whole.begin + part.end};
  }
};

// The cells of some heads, round by round, in no more order than sums need: a cell waits for those that add to its
// chunks before it, and not for its round. Inside a cell each row of the sums adds up block by block, so pieces of a
// cell keep the order of every row, and with it the bits, if each waits for the piece before it in its row and in its
// column. Small cells cost more than large ones: pieces are for more threads than a round has cells for.
class Schedule {
 public:
  Schedule(Cut cut, bool symmetric, int64_t heads, int64_t pieces)
      : cut_(cut),
        symmetric_(symmetric),
        heads_(heads),
        pieces_(pieces),
        queries_(heads * cut.n * pieces),
        keys_(symmetric ? 0 : heads * cut.n * pieces) {
    for (int64_t sum = 0; sum < 2 * pieces - 1; ++sum) {
      for (int64_t a = 0; a < pieces; ++a) {
        if (sum - a >= 0 && sum - a < pieces) order_.push_back({a, sum - a});
      }
    }
  }

  int64_t size() const { return cut_.rounds * order_.size() * heads_ * cut_.n; }

  // Task t, in an order in which none waits for a later one: body(head, cell).
  template <typename Body> void run(int64_t t, const Body& body) {
    const int64_t in_round = heads_ * cut_.n, head = t % in_round / cut_.n, i = t % cut_.n;
    const auto [a, b] = order_[t / in_round % order_.size()];
    const int64_t round = t / in_round / order_.size();
    // The pairs i + j = round (mod n): every chunk is in one cell of a round, of which a symmetric head needs one half.
    const int64_t j = cut_.rounds == 1 ? i : (round - i + cut_.n) % cut_.n;
    if (symmetric_ && (i > j || (i == j && a < b))) return;
    std::atomic<int64_t>& of_queries = queries_[(head * cut_.n + i) * pieces_ + a];
    std::atomic<int64_t>& of_keys = (symmetric_ ? queries_ : keys_)[(head * cut_.n + j) * pieces_ + b];
    const int64_t before_queries = round * pieces_ + b, before_keys = round * pieces_ + a;
    wait(of_queries, before_queries);
    wait(of_keys, before_keys);
    body(head, Cell{round, i, j, pieces_, a, b});
    of_queries.store(before_queries + 1, std::memory_order_release);
    of_keys.store(before_keys + 1, std::memory_order_release);
  }

 private:
  static void wait(const std::atomic<int64_t>& done, int64_t wanted) {
    while (done.load(std::memory_order_acquire) != wanted) std::this_thread::yield();
  }

  const Cut cut_;
  const bool symmetric_;
  const int64_t heads_, pieces_;
  std::vector<std::pair<int64_t, int64_t>> order_;    // of the pieces of a cell
  std::vector<std::atomic<int64_t>> queries_, keys_;  // what was added to every piece of a chunk
};

// Into how many pieces a round's cells, of so many heads, cut their chunks. A forward pass adds up squares cell by
// cell.
inline int64_t pieces(const Call& call, Cut cut, int64_t heads, bool backward) {
  if (!backward) return 1;
  const int64_t cells = std::max<int64_t>(heads * cut.n / (call.symmetric ? 2 : 1), 1);
  const int64_t blocks = chunk(std::max(call.size.N, call.size.M), cut.n, 0).size() / kPureBlock;
  return std::clamp<int64_t>(ceil_div(kPiecesPerThread * get_num_threads(), cells), 1, std::max<int64_t>(blocks, 1));
}

// For every head of a range: begin(head, chunk, sums), then cell(head, cell, sums, scratch), then end(head, chunk,
// sums).
template <typename Begin, typename RunCell, typename End>
void run_heads(const Call& call, Range range, Cut cut, int64_t head_bytes, bool backward, const Begin& begin,
               const RunCell& cell, const End& end) {
  const auto [n, rounds] = cut;
  const int64_t heads = range.end - range.begin;
  PureHead largest = call.head(0);
  largest.N = call.size.N, largest.M = call.size.M;
  const int64_t scratch = call.kernels.pure.scratch_bytes(largest, backward);
  const double head_work = double(call.size.N) * call.size.M * (call.size.d + call.size.d_v);

  if (head_bytes <= kOwnSumsBytes && heads >= get_num_threads()) {
    run_tasks(heads, heads * head_work, scratch + head_bytes, [&](int64_t task, char* memory) {
      const int64_t head = range.begin + task;
      char* sums = memory + scratch;
      for (int64_t i = 0; i < n; ++i) begin(head, i, sums);
      Schedule own(cut, call.symmetric, 1, 1);
      for (int64_t t = 0; t < own.size(); ++t) own.run(t, [&](int64_t, const Cell& c) { cell(head, c, sums, memory); });
      for (int64_t i = 0; i < n; ++i) end(head, i, sums);
    });
    return;
  }
  const int64_t together = std::clamp<int64_t>(kSumsBytes / std::max<int64_t>(head_bytes, 1), 1, heads);
  const Buffer all_sums(together * head_bytes);
  for (int64_t first = range.begin; first < range.end; first += together) {
    const int64_t some = std::min(together, range.end - first), tasks = some * n;
    const double work = some * head_work;
    const auto sums = [&](int64_t head) { return all_sums.data() + head * head_bytes; };
    run_tasks(tasks, work, 0, [&](int64_t t, char*) { begin(first + t / n, t % n, sums(t / n)); });
    Schedule schedule(cut, call.symmetric, some, pieces(call, cut, some, backward));
    run_tasks(schedule.size(), work, scratch, [&](int64_t t, char* memory) {
      schedule.run(t, [&](int64_t head, const Cell& c) { cell(first + head, c, sums(head), memory); });
    });
    run_tasks(tasks, work, 0, [&](int64_t t, char*) { end(first + t / n, t % n, sums(t / n)); });
  }
}

}  // namespace infsa::cpu::pure
