// The passes of Linear-InfSA's forward.
#pragma once

#include "linear_parts.cuh"

namespace infsa::cuda {

// The queries' pass of forward: sum e_i q_i and sum e_i, e_i = ||q_i||. Keeps the rows on chip for the keys' pass, if
// `kept` is given.
template <typename T, bool kAligned> struct EnergyPass {
  static constexpr int kAhead = kRowsAhead<T, kAligned, false>;
  const Place& at;
  Tokens<kAhead> tokens;
  Cursor<T, kAligned> q;
  Kept counts;
  Raw<T>* kept;
  int lanes;
  Raw<T> rows[kAhead] = {};
  Sums sums;

  INFSA_DEVICE EnergyPass(const LinearArgs& a, const Place& at, int64_t split, Raw<T>* kept)
      : at(at),
        tokens(split, a.plan.query_span, a.N, at.slot, at.stride),
        q(at.lane_of<T, kAligned>(a.q, a.d), tokens),
        counts(a.query_mask, at.b),
        kept(kept ? kept + simt::thread() : nullptr),
        lanes(a.plan.lanes) {
    load_group(*this);
  }
  INFSA_DEVICE bool whole() const { return tokens.whole() && counts.all(); }

  template <bool kWhole> INFSA_DEVICE void load() {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if constexpr (kWhole) {
        q.load(rows[u]);
      } else {
        q.load(rows[u], tokens.has(u) && at.exists && (kept || counts(tokens.at + u * tokens.stride)));
      }
    }
  }
  template <bool kWhole> INFSA_DEVICE void add() {
    if (kept) {
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (kWhole || tokens.has(u)) kept[u * kThreads] = rows[u];
        if (!kWhole && tokens.has(u) && !counts(tokens.at + u * tokens.stride)) rows[u] = Raw<T>{};
      }
      kept += kAhead * kThreads;
    }
    float squares[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      float x[kLaneElements];
      widen(rows[u], x);
      squares[u] = dot(x, x);
    }
    sum_lanes(squares, lanes);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      float x[kLaneElements];
      widen(rows[u], x);
      sums.add(squares[u] * inverse_root(squares[u]), x);
    }
  }
};

// The keys' pass of forward: sum r_j v_j and sum r_j, r_j = ReLU(t_j), t_j = qbar . kappa_j, with the bits that they
// have in the backward; with a floor sum v_j and sum |t_j| too. The first rows are on their way before qbar is known.
template <typename T, bool kAligned, bool kFloor> struct ScorePass {
  static constexpr int kAhead = kRowsAhead<T, kAligned, kFloor>;
  const Place& at;
  Tokens<kAhead> tokens;
  Cursor<T, kAligned> k, v;
  Kept counts;
  const Raw<T>* kept;
  int lanes;
  float scale;
  Raw<T> keys[kAhead] = {}, values[kAhead] = {};
  float qbar[kLaneElements];
  Sums sums, floor;

  INFSA_DEVICE ScorePass(const LinearArgs& a, const Place& at, int64_t split, const Raw<T>* kept)
      : at(at),
        tokens(split, a.plan.key_span, a.M, at.slot, at.stride),
        k(at.lane_of<T, kAligned>(a.k, a.d), tokens),
        v(at.lane_of<T, kAligned>(a.v, a.d_v), tokens),
        counts(a.key_mask, at.b),
        kept(kept ? kept + simt::thread() : nullptr),
        lanes(a.plan.lanes),
        scale(a.scale) {
    load_group(*this);
  }
  INFSA_DEVICE bool whole() const { return tokens.whole() && counts.all(); }
  INFSA_DEVICE bool live(int u) const { return tokens.has(u) && at.exists && counts(tokens.at + u * tokens.stride); }

  template <bool kWhole> INFSA_DEVICE void load() {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if constexpr (kWhole) {
        v.load(values[u]);
        if (!kept) k.load(keys[u]);
      } else {
        v.load(values[u], live(u));
        if (!kept) k.load(keys[u], live(u));
      }
    }
  }
  template <bool kWhole> INFSA_DEVICE void add() {
    float t[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      float x[kLaneElements];
      if (kept) keys[u] = kWhole || live(u) ? kept[u * kThreads] : Raw<T>{};
      widen(keys[u], x);
      t[u] = dot(qbar, x);
    }
    sum_lanes(t, lanes);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      float y[kLaneElements];
      widen(values[u], y);
      const float score = kWhole || live(u) ? scale * t[u] : 0.f;
      sums.add(relu(score), y);
      if constexpr (kFloor) {
        for (int i = 0; i < kLaneElements; ++i) floor.x[i] += y[i];
        floor.weight += fabsf(score);
      }
    }
    if (kept) kept += kAhead * kThreads;
  }
};

// From the total over the queries: qbar, and the statistics if this block is to write them.
INFSA_DEVICE void central_query(const LinearArgs& a, const Place& at, const Shared& shared, bool write, float* qbar) {
  float norms;
  total_row(a.plan, at, shared.total, qbar, norms);
  const float energy = a.scale * norms;
  write = write && at.exists && at.slot == 0;
  if (write && at.lane == 0) a.energy_sum[at.head(a)] = energy;
  for (int i = 0; i < kLaneElements; ++i) {
    qbar[i] = a.scale * (a.scale * qbar[i] / (energy + a.eps));
    if (write && at.column + i < a.d) a.central_query[at.head(a) * a.d + at.column + i] = qbar[i];
  }
}

template <typename T, bool kFloor>
INFSA_DEVICE void store_result(const LinearArgs& a, const Place& at, const Shared& shared) {
  const float keys = kFloor ? count_keys(a, at, shared) : 1.f;
  if (at.slot != 0 || !at.exists) return;
  float x[kLaneElements], values[kLaneElements] = {}, scores, absolute = 0;
  total_row(a.plan, at, shared.total, x, scores);
  if constexpr (kFloor) total_row(a.plan, at, shared.floor_total, values, absolute);
  if (at.lane == 0) a.score_sum[at.head(a)] = scores;
  if (kFloor && at.lane == 0) a.absolute_sum[at.head(a)] = absolute;
  const float rho = rho_of(a, at), share = a.floor * absolute;
  for (int i = 0; i < kLaneElements && at.column + i < a.d_v; ++i) {
    const int64_t to = at.head(a) * a.d_v + at.column + i;
    float z;
    if constexpr (kFloor) {
      const float mean = values[i] / keys;
      a.value_mean[to] = mean;
      z = (x[i] + share * mean) / (scores + share + a.eps);
      // Every weight is above 0: where a value is infinite so is the result, though its score be 0.
      if (share > 0 && share <= kLargestFloat && fabsf(mean) > kLargestFloat) z = mean;
    } else {
      z = x[i] / (scores + a.eps);
    }
    a.context[to] = z;
    round_to(static_cast<T*>(a.out)[to], rho * z);
  }
}

}  // namespace infsa::cuda
