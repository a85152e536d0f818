// The passes of Linear-InfSA's backward.
#pragma once

#include "linear_parts.cuh"

namespace infsa::cuda {

// The keys' pass of backward: dv_j, dk_j (untied) or dt_j (tied); the sum over the keys of dt_j kappa_j.
template <typename T, bool kAligned, bool kFloor> struct KeyGradientPass {
  static constexpr int kAhead = kRowsAhead<T, kAligned, true>;
  const LinearArgs& a;
  const Place& at;
  Tokens<kAhead> tokens;
  Cursor<T, kAligned> k, v, dk, dv;
  Kept counts;
  float* dscores;
  Raw<T> keys[kAhead] = {}, values[kAhead] = {};
  float qbar[kLaneElements], dz[kLaneElements], dz_z, per_score, floor_weight = 0, floor_slope = 0;
  Sums sums;

  INFSA_DEVICE KeyGradientPass(const LinearArgs& a, const Place& at, int64_t split, const Shared& shared)
      : a(a),
        at(at),
        tokens(split, a.plan.key_span, a.M, at.slot, at.stride),
        k(at.lane_of<T, kAligned>(a.k, a.d), tokens),
        v(at.lane_of<T, kAligned>(a.v, a.d_v), tokens),
        dk(at.lane_of<T, kAligned>(a.dk, a.d), tokens),
        dv(at.lane_of<T, kAligned>(a.dv, a.d_v), tokens),
        counts(a.key_mask, at.b),
        dscores(a.dscores && at.lane == 0 ? a.dscores + at.head(a) * a.N : nullptr) {
    load_group(*this);
    float z[kLaneElements];
    load_head(a, at, a.central_query, a.d, qbar);
    load_head(a, at, a.context, a.d_v, z);
    Raw<T> raw_dz{};
    const auto dz_row = at.lane_of<T, false>(a.dout, a.d_v);
    dz_row.load(dz_row.data, raw_dz);
    widen(raw_dz, dz);
    const float drho = dot(dz, z, a.plan.lanes), rho = rho_of(a, at);
    if (split == 0 && at.slot == 0 && at.lane == 0 && at.exists && a.dhead_rho) {
      a.dhead_rho[at.head(a)] = a.rho * drho;
    }
    // Rounded as the products that it is subtracted from, from which it differs little where one key has the weight.
    for (int i = 0; i < kLaneElements; ++i) dz[i] *= rho;
    dz_z = dot(dz, z, a.plan.lanes);
    float norm = (at.exists ? a.score_sum[at.head(a)] : 0.f) + a.eps;
    if constexpr (kFloor) {
      const float share = a.floor * (at.exists ? a.absolute_sum[at.head(a)] : 0.f);
      float mean[kLaneElements];
      load_head(a, at, a.value_mean, a.d_v, mean);
      for (int i = 0; i < kLaneElements; ++i) mean[i] -= z[i];
      norm += share;
      floor_weight = share / norm / count_keys(a, at, shared);
      floor_slope = a.floor * dot(dz, mean, a.plan.lanes) / norm;
    }
    per_score = 1 / norm;
  }
  INFSA_DEVICE bool whole() const { return tokens.whole() && counts.all(); }
  INFSA_DEVICE bool live(int u) const { return tokens.has(u) && at.exists && counts(tokens.at + u * tokens.stride); }

  template <bool kWhole> INFSA_DEVICE void load() {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if constexpr (kWhole) {
        k.load(keys[u]), v.load(values[u]);
      } else {
        k.load(keys[u], live(u)), v.load(values[u], live(u));
      }
    }
  }
  template <bool kWhole> INFSA_DEVICE void add() {
    float products[2 * kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      float x[kLaneElements], y[kLaneElements];
      widen(keys[u], x);
      widen(values[u], y);
      products[u] = dot(qbar, x), products[kAhead + u] = dot(dz, y);
    }
    sum_lanes(products, a.plan.lanes);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      float x[kLaneElements];
      const float t = a.scale * products[u], dr = (products[kAhead + u] - dz_z) * per_score;
      float dt = t <= 0 ? 0.f : dr, weight = relu(t) * per_score;
      if constexpr (kFloor) {
        dt += t > 0 ? floor_slope : t < 0 ? -floor_slope : 0.f;
        weight += floor_weight;
      }
      const bool counted = kWhole || live(u), there = at.exists && (kWhole || tokens.has(u));
      if (!counted) dt = weight = 0;
      const float along = a.scale * dt;
      widen(keys[u], x);
      sums.add(along, x);
      if (dscores && there) dscores[tokens.at + u * tokens.stride] = dt;
      if (a.dv.data) {
        for (int i = 0; i < kLaneElements; ++i) x[i] = counted ? weight * dz[i] : 0.f;
        dv.store(x, there);
      }
      if (a.dk.data) {
        for (int i = 0; i < kLaneElements; ++i) x[i] = counted ? along * qbar[i] : 0.f;
        dk.store(x, there);
      }
    }
  }
};

// The queries' pass of backward: dq_i, and where tied dk_i with it. The total over the keys is d qbar; the first rows
// are on their way before it is known.
template <typename T, bool kAligned> struct QueryGradientPass {
  static constexpr int kAhead = kRowsAhead<T, kAligned, true>;
  const LinearArgs& a;
  const Place& at;
  Tokens<kAhead> tokens;
  Cursor<T, kAligned> q, dq;
  Kept counts, is_key;
  const float* dscores;
  Raw<T> rows[kAhead] = {};
  float dqbar[kLaneElements], qbar[kLaneElements], qbar_dqbar, per_energy;

  INFSA_DEVICE QueryGradientPass(const LinearArgs& a, const Place& at, int64_t split)
      : a(a),
        at(at),
        tokens(split, a.plan.query_span, a.N, at.slot, at.stride),
        q(at.lane_of<T, kAligned>(a.q, a.d), tokens),
        dq(at.lane_of<T, kAligned>(a.dq, a.d), tokens),
        counts(a.query_mask, at.b),
        is_key(a.key_mask, at.b),
        dscores(a.tied ? a.dscores + at.head(a) * a.N : nullptr) {
    load_group(*this);
  }
  INFSA_DEVICE void with(const Shared& shared) {
    float weight;
    total_row(a.plan, at, shared.total, dqbar, weight);
    load_head(a, at, a.central_query, a.d, qbar);
    qbar_dqbar = dot(qbar, dqbar, a.plan.lanes);
    per_energy = 1 / ((at.exists ? a.energy_sum[at.head(a)] : 0.f) + a.eps);
  }
  INFSA_DEVICE bool whole() const { return tokens.whole() && counts.all(); }
  INFSA_DEVICE bool live(int u) const { return tokens.has(u) && at.exists && counts(tokens.at + u * tokens.stride); }

  template <bool kWhole> INFSA_DEVICE void load() {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if constexpr (kWhole) {
        q.load(rows[u]);
      } else {
        q.load(rows[u], live(u));
      }
    }
  }
  template <bool kWhole> INFSA_DEVICE void add() {
    float products[2 * kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      float x[kLaneElements];
      widen(rows[u], x);
      products[u] = dot(x, x), products[kAhead + u] = dot(x, dqbar);
    }
    sum_lanes(products, a.plan.lanes);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int token = tokens.at + u * tokens.stride;
      const bool counted = kWhole || live(u), there = at.exists && (kWhole || tokens.has(u));
      // ||q_i||, of which a row without length has no gradient; scaled it is e_i.
      const float inverse = inverse_root(products[u]), e = a.scale * (products[u] * inverse);
      const float along = (a.scale * products[kAhead + u] - qbar_dqbar) * per_energy * inverse, w = e * per_energy;
      const float dt = dscores && there && is_key(token) ? simt::load_written(dscores + token) : 0.f;
      float x[kLaneElements];
      widen(rows[u], x);
      for (int i = 0; i < kLaneElements; ++i) {
        float g = counted ? w * dqbar[i] + along * x[i] : 0.f;
        if (dscores) g += dt * qbar[i];
        x[i] = a.scale * g;
      }
      dq.store(x, there);
    }
  }
};

}  // namespace infsa::cuda
