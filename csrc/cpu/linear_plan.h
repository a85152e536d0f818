// How linear.cpp and linear_steps.cpp cut the work of a call: units, waves of units, and chunks of a unit's tokens; and
// the units of measure of its heads. The cut depends on sizes alone and partial sums are added in their order, in
// double: the same bits for any number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "isa.h"
#include "memory.h"
#include "packed.h"
#include "parallel.h"
#include "range.h"

namespace infsa::cpu::linear {

// Elements that are worth handing to another thread.
constexpr int64_t kGrain = 1 << 15;
// More would make adding the partial sums show, fewer would leave threads idle.
constexpr int64_t kMaxChunks = 128;
constexpr int64_t kFewTokens = 64;
// Chunks are cut between so many tokens: as many as the longest vector has lanes.
constexpr int64_t kWhole = 16;
// Bytes of q that one wave of heads may have, so that its second pass finds them in the last-level cache.
constexpr int64_t kWaveBytes = 8 << 20;
// Bytes of q and v that are taken to stay in a core's own cache from one call's pass to the next.
constexpr int64_t kCacheBytes = 2 << 20;

// What a head may be, but for 0: its numbers left the range of the accumulation type; or a sum of values is 0 though
// that of their weights is not, so that the values are, or were their products too small.
constexpr char kOutOfRange = 1, kVanished = 2;

// How the work of one call is cut. A unit is what one kernel call may span: a head, or all heads of a batch where the
// heads of a token lie side by side ("token-major", a (B, N, H, d) tensor).
struct Plan {
  const Kernels& kernels;
  const Sizes s;
  const bool wide;  // the accumulation type is double
  const int64_t acc_bytes, element_bytes, heads, units;
  const int64_t d, d_v;  // in whole vectors
  const bool in_cache;
  int64_t wave;

  // tokens: queries of a batch, or what they are on average.
  Plan(const Sizes& s, int64_t tokens, const Tensor& q, const Tensor& k, const Tensor& v)
      : kernels(kernels_for(q.dtype())),
        s(s),
        wide(acc_dtype(q) == kDouble),
        acc_bytes(wide ? 8 : 4),
        element_bytes(q.element_size()),
        heads(s.H > 1 && token_major(q) && token_major(k) && token_major(v) ? s.H : 1),
        units(s.B * s.H / heads),
        d(round_up(s.d, kernels.lanes)),
        d_v(round_up(s.d_v, kernels.lanes)),
        in_cache(std::max(tokens, s.M) * heads * (s.d + s.d_v) * element_bytes <= kCacheBytes) {
    const int64_t unit_bytes = tokens * s.d * heads * element_bytes;
    wave = std::clamp<int64_t>(kWaveBytes / std::max<int64_t>(unit_bytes, 1), 1, std::max<int64_t>(units, 1));
  }

  // How many chunks so many tokens make: an even number, of which two threads have as many. Where a chunk has few
  // tokens, adding up its sums shows: of twice as many sums, twice as many tokens.
  int64_t chunks(int64_t tokens, int64_t kinds) const {
    const int64_t worth = ceil_div(kGrain, heads * std::max<int64_t>(d + d_v, 1));
    const int64_t least = round_up(std::max(worth, std::min(kinds * worth, kFewTokens)), kWhole);
    const int64_t n = std::clamp<int64_t>(tokens / least, 1, kMaxChunks);
    return n > 1 ? n - n % 2 : n;
  }
  // The i-th of n chunks, alike but that groups of rows stay whole.
  static Range chunk(const Range& all, int64_t n, int64_t i) {
    const auto at = [&](int64_t i) { return i == n ? all.end : all.begin + all.size() * i / n / kWhole * kWhole; };
    return {at(i), at(i + 1)};
  }
  // Numbers in `kinds` weighted sums of rows, and of their weights.
  int64_t sums_size(int64_t width, int64_t kinds) const { return kinds * heads * (width + 1); }
  // Bytes of a vector or a scalar per head.
  int64_t head_bytes(int64_t width) const { return s.B * s.H * width * acc_bytes; }
  Numbers numbers(const Buffer& buffer) const { return {buffer, wide}; }

  // run(begin, end) over all units, a wave at a time.
  template <typename Run> void for_waves(const Run& run) const {
    for (int64_t begin = 0; begin < units; begin += wave) run(begin, std::min(begin + wave, units));
  }
  // The same for the units that have a strange head, once set(head) has found units of measure for one.
  template <typename Set, typename Run>
  void for_strange(const std::vector<char>& strange, const Set& set, const Run& run) const {
    std::vector<char> found(units);
    for (int64_t head = 0; head < s.B * s.H; ++head) {
      if (strange[head] && set(head)) found[head / heads] = true;
    }
    for (int64_t unit = 0; unit < units; ++unit) {
      if (found[unit]) run(unit, unit + 1);
    }
  }

  // Normalisers divide products of two rows; sums of products may be larger.
  bool is_factor(double x) const { return within(x, kMostFactor, wide); }
  bool is_sum(double largest) const { return within(largest, kMostSum, wide); }
  // What a head is by a sum of its rows and that of their weights.
  char strange(double weights, const double* sum, int64_t n) const {
    const double largest = kernels.linear.largest(sum, n);
    if (!is_factor(weights) || !is_sum(largest)) return kOutOfRange;
    return largest == 0 && weights != 0 ? kVanished : 0;
  }

 private:
  static bool token_major(const Tensor& t) { return t.stride(1) < t.stride(2); }
};

// The queries or the keys of a call, in chunks: at least one for each unit, by its own number of tokens alone.
class Walk {
 public:
  // Every batch has so many tokens; or they are packed, and `all` is the number of all of them. kinds: of sums.
  Walk(const Plan& plan, int64_t tokens, const Offsets* packed, int64_t kinds = 1)
      : plan_(plan), packed_(packed), kinds_(kinds), all_(packed ? packed->at.back() : tokens), first_(plan.units + 1) {
    for (int64_t unit = 0; unit < plan.units; ++unit) {
      const int64_t n = this->tokens(unit * plan.heads).size();
      first_[unit + 1] = first_[unit] + plan.chunks(n, kinds);
    }
  }

  // Those of a head, and of a batch.
  Range tokens(int64_t head) const { return of_batch(packed_ ? head / plan_.s.H : 0); }
  Range of_batch(int64_t b) const { return packed_ ? Range{packed_->at[b], packed_->at[b + 1]} : Range{0, all_}; }

  // Bytes of the sums of a wave.
  int64_t sums_bytes(int64_t width) const {
    int64_t most = 0;
    plan_.for_waves([&](int64_t begin, int64_t end) { most = std::max(most, first_[end] - first_[begin]); });
    return most * plan_.sums_size(width, kinds_) * sizeof(double);
  }
  // Bytes of a scalar for each token and head: of a wave, or of all where they are packed.
  int64_t scalars_bytes() const { return (packed_ ? groups() : plan_.wave) * unit_bytes(); }

  // One pass over the tokens of units [begin, end). sums, where given, is (chunks, sums_size(width, kinds)).
  void run(LinearPass pass, const LinearArgs& args, int64_t begin, int64_t end, double* sums, int64_t width,
           char* dscores) const {
    const int64_t heads = plan_.heads, H = plan_.s.H, size = plan_.sums_size(width, kinds_);
    const int64_t grain = std::max<int64_t>(1, kGrain / ((mean() + 1) * heads * (plan_.d + plan_.d_v + 1)));
    parallel_for(first_[begin], first_[end], grain, [&](int64_t from, int64_t to) {
      const Buffer scratch(plan_.kernels.linear.scratch_bytes(pass, heads, plan_.s.d, plan_.s.d_v));
      int64_t unit = std::upper_bound(first_.begin(), first_.end(), from) - first_.begin() - 1;
      for (int64_t i = from; i < to; ++i) {
        unit += i == first_[unit + 1];
        const int64_t head = unit * heads;
        const Range all = tokens(head);
        const Range part = Plan::chunk(all, first_[unit + 1] - first_[unit], i - first_[unit]);
        double* chunk_sums = sums ? sums + (i - first_[begin]) * size : nullptr;
        if (sums && !all.size()) std::memset(chunk_sums, 0, size * sizeof(double));
        char* scalars = dscores ? dscores + (packed_ ? unit % groups() : unit - begin) * unit_bytes() : nullptr;
        plan_.kernels.linear.run(
            pass, args, {head / H, head % H, heads, part.begin, part.end, chunk_sums, scalars, scratch.data()});
      }
    });
  }

  // Adds the chunks' sums up and calls body(head, vector sums, weight sums) for every head of the units, both by kind.
  template <typename Body>
  void for_heads(int64_t begin, int64_t end, double* sums, int64_t width, const Body& body) const {
    const int64_t heads = plan_.heads, size = plan_.sums_size(width, kinds_);
    const int64_t chunks = first_.back() / std::max<int64_t>(plan_.units, 1);
    parallel_for(begin, end, std::max<int64_t>(1, kGrain / ((chunks + 1) * size)), [&](int64_t from, int64_t to) {
      for (int64_t unit = from; unit < to; ++unit) {
        double* total = sums + (first_[unit] - first_[begin]) * size;
        plan_.kernels.linear.add_up(total, size, first_[unit + 1] - first_[unit]);
        const double* weights = total + kinds_ * heads * width;
        for (int64_t h = 0; h < heads; ++h) {
          body(
              unit * heads + h, [&](int64_t kind) { return total + (kind * heads + h) * width; },
              [&](int64_t kind) { return weights[kind * heads + h]; });
        }
      }
    });
  }

 private:
  int64_t groups() const { return plan_.s.H / plan_.heads; }  // units of a batch
  int64_t unit_bytes() const { return all_ * plan_.heads * plan_.acc_bytes; }
  // Tokens of a chunk.
  int64_t mean() const { return all_ * (packed_ ? groups() : plan_.units) / std::max<int64_t>(first_.back(), 1); }

  const Plan& plan_;
  const Offsets* packed_;
  const int64_t kinds_, all_;
  std::vector<int64_t> first_;  // the number of each unit's first chunk, and of the one behind the last
};

// What the rows of a head are multiplied by as they are read, and score_scale with them.
struct HeadUnits {
  double q = 1, k = 1, v = 1, dout = 1, score = 1;
};

// The units of measure of a call's heads, once one needs them.
class Units {
 public:
  Units(const Plan& plan, const Walk& queries, const Walk& keys, LinearArgs& args)
      : plan_(plan), queries_(queries), keys_(keys), args_(args) {}

  HeadUnits operator[](int64_t head) const { return heads_.empty() ? HeadUnits{} : heads_[head]; }

  // Brings a head to order one: q, k and v, and with dout (B, H, d_v) that and norm = R + eps. False where that is no
  // help: one is not finite.
  bool set(int64_t head, const Tensor* dout = nullptr, double norm = 1) {
    HeadUnits u = measure(head);
    if (dout) {
      u.dout = unit({dout->data_ptr(), plan_.s.H * plan_.s.d_v, plan_.s.d_v, 0, 1}, head, {0, 1}, plan_.s.d_v, {});
      u.score = std::ldexp(1, std::ilogb(norm * u.q * u.k));
    }
    return install(head, u);
  }

  bool has_values(int64_t head) const {
    return largest(args_.v, head, keys_.tokens(head), plan_.s.d_v, args_.key_mask) != 0;
  }

  // What brings the rows of a head to order one.
  HeadUnits measure(int64_t head) const {
    const Sizes& s = plan_.s;
    HeadUnits u;
    const Range queries = queries_.tokens(head), keys = keys_.tokens(head);
    u.q = unit(args_.q, head, queries, s.d, args_.query_mask);
    u.k = unit(args_.k, head, keys, s.d, args_.key_mask);
    u.v = unit(args_.v, head, keys, s.d_v, args_.key_mask);
    if (args_.k.data == args_.q.data) u.q = u.k = std::min(u.q, u.k);
    return u;
  }

  bool install(int64_t head, const HeadUnits& u) {
    if (u.q * u.k * u.v * u.dout == 0) return false;
    const Sizes& s = plan_.s;
    if (heads_.empty()) {
      heads_.resize(s.B * s.H);
      rows_ = fill(empty({6, s.B * s.H + Buffer::kSlack}, plan_.wide ? kDouble : kFloat), 1);
      const void** parts[] = {&args_.unit.q,  &args_.unit.k,  &args_.unit.v,
                              &args_.unit.dq, &args_.unit.dk, &args_.unit.dv};
      for (int i = 0; i < 6; ++i)
        *parts[i] = static_cast<char*>(rows_.data_ptr()) + i * rows_.stride(0) * rows_.element_size();
    }
    heads_[head] = u;
    const double gradient = 1 / (u.dout * u.score);
    const double values[] = {u.q, u.k, u.v, u.q * gradient / u.v, u.k * gradient / u.v, gradient};
    const Numbers rows(rows_);
    for (int i = 0; i < 6; ++i) rows.set(i * rows_.stride(0) + head, finite(values[i], plan_.wide));
    return true;
  }

 private:
  double unit(const Rows& rows, int64_t head, Range tokens, int64_t columns, const Mask& mask) const {
    return unit_of(largest(rows, head, tokens, columns, mask), plan_.wide);
  }

  // Infinite where a number is not finite.
  double largest(const Rows& rows, int64_t head, Range tokens, int64_t columns, const Mask& mask) const {
    const int64_t b = head / plan_.s.H;
    const Tokens of_head = tokens_of(rows, b, head % plan_.s.H, plan_.element_bytes);
    double most = 0;
    for (int64_t n = tokens.begin, end; n < tokens.end; n = end) {
      end = mask.data ? n + 1 : tokens.end;
      if (mask.data && mask.data[b * mask.batch + n * mask.token]) continue;
      const double x = plan_.kernels.tokens.largest(of_head, columns, {n, end});
      if (!std::isfinite(x)) return std::numeric_limits<double>::infinity();
      most = std::max(most, x);
    }
    return most;
  }

  const Plan& plan_;
  const Walk &queries_, &keys_;
  LinearArgs& args_;
  std::vector<HeadUnits> heads_;
  Tensor rows_;
};

}  // namespace infsa::cpu::linear
