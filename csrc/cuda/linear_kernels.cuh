// Linear-InfSA's device code; the equations are those of docs/linear.md, in its order.
//
// Every pass walks over tokens with the sums in registers and reduces them over the block once, at its end. Partial
// sums of blocks are added in their order by whoever needs the total: the bits depend on shape and device alone. The
// includer provides simt.cuh's primitives.
#pragma once

#include "lanes.cuh"
#include "linear.h"

namespace infsa::cuda {

INFSA_DEVICE float sum_lanes(float x, int lanes) {
  for (int m = 1; m < lanes; m *= 2) x += simt::shuffle_xor(x, m);
  return x;
}

INFSA_DEVICE float dot(const float* a, const float* b, int lanes) {
  float x = 0;
  for (int i = 0; i < kLaneElements; ++i) x += a[i] * b[i];
  return sum_lanes(x, lanes);
}

// NaN stays NaN.
INFSA_DEVICE float relu(float x) { return x <= 0 ? 0 : x; }

// This thread's place in a unit.
struct Place {
  int slot, in_group, lane, column, stride;
  int64_t b, h, unit;
  bool exists;

  INFSA_DEVICE Place(const LinearArgs& a, int64_t unit) : unit(unit) {
    const int at = simt::thread() % a.plan.columns;
    slot = simt::thread() / a.plan.columns;
    in_group = at / a.plan.lanes, lane = at % a.plan.lanes;
    column = lane * kLaneElements, stride = a.plan.slots;
    b = unit / a.plan.unit_groups, h = unit % a.plan.unit_groups * a.plan.heads + in_group;
    exists = h < a.H;
  }
  INFSA_DEVICE int64_t head(const LinearArgs& a) const { return b * a.H + h; }
  template <typename T, bool kAligned> INFSA_DEVICE Lane<T, kAligned> lane_of(const Rows& rows, int size) const {
    return {static_cast<T*>(rows.data) + b * rows.batch + h * rows.head + column * rows.channel, rows.token,
            rows.channel, exists ? size - column : 0};
  }
  INFSA_DEVICE bool kept(const Mask& mask, int64_t token) const {
    return !mask.data || !mask.data[b * mask.batch + token * mask.token];
  }
};

// A thread's sums: 8 elements of a head's vector, and a weight that all lanes of the head agree on.
struct Sums {
  float x[kLaneElements] = {};
  float weight = 0;
  INFSA_DEVICE void add(float w, const float* row) {
    for (int i = 0; i < kLaneElements; ++i) x[i] += w * row[i];
    weight += w;
  }
};

// Shared memory of a block.
struct Shared {
  float *reduce, *total, *first, *second;
  void* queries;
  INFSA_DEVICE explicit Shared(void* memory) : reduce(static_cast<float*>(memory)) {
    total = reduce + kReduceFloats, first = total + kLargestPart, second = first + kLargestPart;
    queries = second + kLargestPart;
  }
};

// The block's sums, as a part.
INFSA_DEVICE void reduce_block(const LinearPlan& p, Sums s, float* reduce, float* part) {
  for (int m = p.columns; m < 32; m *= 2) {
    for (int i = 0; i < kLaneElements; ++i) s.x[i] += simt::shuffle_xor(s.x[i], m);
    s.weight += simt::shuffle_xor(s.weight, m);
  }
  const int warp = simt::thread() / 32, at = simt::thread() % 32, size = p.part_size();
  simt::sync();
  if (at < p.columns) {
    float* mine = reduce + warp * size;
    for (int i = 0; i < kLaneElements; ++i) mine[at * kLaneElements + i] = s.x[i];
    if (at % p.lanes == 0) mine[p.columns * kLaneElements + at / p.lanes] = s.weight;
  }
  simt::sync();
  if (simt::thread() < size) {
    float x = 0;
    for (int w = 0; w < kWarps; ++w) x += reduce[w * size + simt::thread()];
    part[simt::thread()] = x;
  }
}

// total = sum of `count` parts side by side in global memory.
INFSA_DEVICE void sum_parts(const LinearPlan& p, const float* parts, int64_t count, const Shared& shared) {
  const int size = p.part_size(), rows = kThreads / size, row = simt::thread() / size, at = simt::thread() % size;
  simt::sync();
  if (row < rows) {
    float x = 0;
    for (int64_t i = row; i < count; i += rows) x += simt::load_written(parts + i * size + at);
    shared.reduce[row * size + at] = x;
  }
  simt::sync();
  if (simt::thread() < size) {
    float x = 0;
    for (int r = 0; r < rows; ++r) x += shared.reduce[r * size + simt::thread()];
    shared.total[simt::thread()] = x;
  }
  simt::sync();
}

// total = sum of a part of every block of the cluster.
INFSA_DEVICE void sum_cluster(const LinearPlan& p, float* part, const Shared& shared) {
  simt::cluster_sync();
  if (simt::thread() < p.part_size()) {
    float x = 0;
    for (int r = 0; r < p.splits; ++r) x += simt::of_block(part, r)[simt::thread()];
    shared.total[simt::thread()] = x;
  }
  simt::sync();
}

INFSA_DEVICE void total_row(const LinearPlan& p, const Place& at, const Shared& shared, float* x, float& weight) {
  for (int i = 0; i < kLaneElements; ++i) {
    x[i] = shared.total[(at.in_group * p.lanes + at.lane) * kLaneElements + i];
  }
  weight = shared.total[p.columns * kLaneElements + at.in_group];
}

INFSA_DEVICE void load_head(const LinearArgs& a, const Place& at, const float* heads, int size, float* x) {
  for (int i = 0; i < kLaneElements; ++i) {
    x[i] = at.exists && at.column + i < size ? heads[at.head(a) * size + at.column + i] : 0.f;
  }
}

INFSA_DEVICE float rho_of(const LinearArgs& a, const Place& at) {
  return a.rho * (a.head_rho && at.exists ? a.head_rho[at.b * a.rho_b + at.h * a.rho_h] : 1.f);
}

INFSA_DEVICE int64_t end_of(int64_t begin, int64_t span, int64_t size) {
  return begin + span < size ? begin + span : size;
}

// sum e_i q_i and sum e_i, e_i = ||q_i||. Keeps the rows on chip for the keys' pass, if `kept` is given.
template <typename T, bool kAligned>
INFSA_DEVICE Sums sum_queries(const LinearArgs& a, const Place& at, int64_t split, Raw<T>* kept) {
  constexpr int kAhead = kRowsAhead<T, kAligned, false>;
  const auto q_rows = at.lane_of<T, kAligned>(a.q, a.d);
  const int64_t from = split * a.plan.query_span, to = end_of(from, a.plan.query_span, a.N);
  Sums sums;
  for (int64_t base = from; base < to; base += int64_t{at.stride} * kAhead) {
    Raw<T> raw[kAhead];
    bool live[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t token = base + u * at.stride + at.slot;
      live[u] = token < to && at.exists && (kept || at.kept(a.query_mask, token));
      raw[u] = live[u] ? q_rows.load(token) : Raw<T>{};
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t token = base + u * at.stride + at.slot;
      if (kept && token < to) {
        kept[(token - from) * a.plan.columns + simt::thread() % a.plan.columns] = raw[u];
        live[u] = live[u] && at.kept(a.query_mask, token);
      }
      float x[kLaneElements];
      widen(raw[u], live[u], x);
      sums.add(sqrtf(dot(x, x, a.plan.lanes)), x);
    }
  }
  return sums;
}

// sum r_j v_j and sum r_j, r_j = ReLU(qbar . kappa_j), with the bits that they have in the backward.
template <typename T, bool kAligned>
INFSA_DEVICE Sums sum_keys(const LinearArgs& a, const Place& at, int64_t split, const float* qbar, const Raw<T>* kept) {
  constexpr int kAhead = kRowsAhead<T, kAligned, false>;
  const auto k_rows = at.lane_of<T, kAligned>(a.k, a.d);
  const auto v_rows = at.lane_of<T, kAligned>(a.v, a.d_v);
  const int64_t from = split * a.plan.key_span, to = end_of(from, a.plan.key_span, a.M);
  Sums sums;
  for (int64_t base = from; base < to; base += int64_t{at.stride} * kAhead) {
    Raw<T> k[kAhead], v[kAhead];
    bool live[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t token = base + u * at.stride + at.slot;
      live[u] = token < to && at.exists && at.kept(a.key_mask, token);
      v[u] = live[u] ? v_rows.load(token) : Raw<T>{};
      if (!kept) k[u] = live[u] ? k_rows.load(token) : Raw<T>{};
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      float x[kLaneElements], y[kLaneElements];
      if (kept) {
        const int64_t row = base + u * at.stride + at.slot - from;
        k[u] = live[u] ? kept[row * a.plan.columns + simt::thread() % a.plan.columns] : Raw<T>{};
      }
      widen(k[u], live[u], x);
      widen(v[u], live[u], y);
      const float r = relu(a.scale * dot(qbar, x, a.plan.lanes));
      sums.add(live[u] ? r : 0.f, y);
    }
  }
  return sums;
}

// From the total over the queries: qbar, and the statistics if this block is to write them.
INFSA_DEVICE void central_query(const LinearArgs& a, const Place& at, const Shared& shared, bool write, float* qbar) {
  float norms;
  total_row(a.plan, at, shared, qbar, norms);
  const float energy = a.scale * norms;
  write = write && at.exists && at.slot == 0;
  if (write && at.lane == 0) a.energy_sum[at.head(a)] = energy;
  for (int i = 0; i < kLaneElements; ++i) {
    qbar[i] = a.scale * (a.scale * qbar[i] / (energy + a.eps));
    if (write && at.column + i < a.d) a.central_query[at.head(a) * a.d + at.column + i] = qbar[i];
  }
}

template <typename T> INFSA_DEVICE void store_result(const LinearArgs& a, const Place& at, const Shared& shared) {
  if (at.slot != 0 || !at.exists) return;
  float x[kLaneElements], scores;
  total_row(a.plan, at, shared, x, scores);
  if (at.lane == 0) a.score_sum[at.head(a)] = scores;
  const float rho = rho_of(a, at);
  for (int i = 0; i < kLaneElements && at.column + i < a.d_v; ++i) {
    const int64_t to = at.head(a) * a.d_v + at.column + i;
    const float z = x[i] / (scores + a.eps);
    a.context[to] = z;
    round_to(static_cast<T*>(a.out)[to], rho * z);
  }
}

// dv_j, dk_j (untied) or dt_j (tied); the sum over the keys of dt_j kappa_j.
template <typename T, bool kAligned>
INFSA_DEVICE Sums keys_backward(const LinearArgs& a, const Place& at, int64_t split) {
  constexpr int kAhead = kRowsAhead<T, kAligned, true>;
  const auto k_rows = at.lane_of<T, kAligned>(a.k, a.d);
  const auto v_rows = at.lane_of<T, kAligned>(a.v, a.d_v);
  const auto dk_rows = at.lane_of<T, kAligned>(a.dk, a.d);
  const auto dv_rows = at.lane_of<T, kAligned>(a.dv, a.d_v);
  float qbar[kLaneElements], dz[kLaneElements], z[kLaneElements];
  load_head(a, at, a.central_query, a.d, qbar);
  load_head(a, at, a.context, a.d_v, z);
  const Raw<T> raw_dz = at.exists ? at.lane_of<T, false>(a.dout, a.d_v).load(0) : Raw<T>{};
  widen(raw_dz, at.exists, dz);
  const float dz_z = dot(dz, z, a.plan.lanes), rho = rho_of(a, at);
  if (split == 0 && at.slot == 0 && at.lane == 0 && at.exists && a.dhead_rho) {
    a.dhead_rho[at.head(a)] = a.rho * dz_z;
  }
  const float per_score = 1 / ((at.exists ? a.score_sum[at.head(a)] : 0.f) + a.eps);
  for (int i = 0; i < kLaneElements; ++i) dz[i] *= rho;

  const int64_t from = split * a.plan.key_span, to = end_of(from, a.plan.key_span, a.M);
  Sums sums;
  for (int64_t base = from; base < to; base += int64_t{at.stride} * kAhead) {
    Raw<T> k[kAhead], v[kAhead];
    bool live[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t token = base + u * at.stride + at.slot;
      live[u] = token < to && at.exists && at.kept(a.key_mask, token);
      k[u] = live[u] ? k_rows.load(token) : Raw<T>{};
      v[u] = live[u] ? v_rows.load(token) : Raw<T>{};
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t token = base + u * at.stride + at.slot;
      float x[kLaneElements], y[kLaneElements];
      widen(k[u], live[u], x);
      widen(v[u], live[u], y);
      const float t = a.scale * dot(qbar, x, a.plan.lanes);
      const float dr = (dot(dz, y, a.plan.lanes) - rho * dz_z) * per_score;
      const float dt = !live[u] || t <= 0 ? 0.f : dr, weight = live[u] ? relu(t) * per_score : 0.f;
      sums.add(a.scale * dt, x);
      if (token >= to || !at.exists) continue;
      if (a.dscores && at.lane == 0) a.dscores[at.head(a) * a.N + token] = dt;
      if (a.dv.data) {
        for (int i = 0; i < kLaneElements; ++i) y[i] = live[u] ? weight * dz[i] : 0.f;
        dv_rows.store(token, y);
      }
      if (a.dk.data) {
        for (int i = 0; i < kLaneElements; ++i) x[i] = live[u] ? a.scale * dt * qbar[i] : 0.f;
        dk_rows.store(token, x);
      }
    }
  }
  return sums;
}

// dq_i, and where tied dk_i with it. The total over the keys is d qbar.
template <typename T, bool kAligned>
INFSA_DEVICE void queries_backward(const LinearArgs& a, const Place& at, int64_t split, const Shared& shared) {
  constexpr int kAhead = kRowsAhead<T, kAligned, true>;
  const auto q_rows = at.lane_of<T, kAligned>(a.q, a.d);
  const auto dq_rows = at.lane_of<T, kAligned>(a.dq, a.d);
  float dqbar[kLaneElements], qbar[kLaneElements], weight;
  total_row(a.plan, at, shared, dqbar, weight);
  load_head(a, at, a.central_query, a.d, qbar);
  const float qbar_dqbar = dot(qbar, dqbar, a.plan.lanes);
  const float per_energy = 1 / ((at.exists ? a.energy_sum[at.head(a)] : 0.f) + a.eps);
  const int64_t from = split * a.plan.query_span, to = end_of(from, a.plan.query_span, a.N);
  for (int64_t base = from; base < to; base += int64_t{at.stride} * kAhead) {
    Raw<T> raw[kAhead];
    bool live[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t token = base + u * at.stride + at.slot;
      live[u] = token < to && at.exists && at.kept(a.query_mask, token);
      raw[u] = live[u] ? q_rows.load(token) : Raw<T>{};
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t token = base + u * at.stride + at.slot;
      float x[kLaneElements];
      widen(raw[u], live[u], x);
      for (int i = 0; i < kLaneElements; ++i) x[i] *= a.scale;
      const float e = sqrtf(dot(x, x, a.plan.lanes));
      const float de = (dot(x, dqbar, a.plan.lanes) - qbar_dqbar) * per_energy;
      if (token >= to || !at.exists) continue;
      const float along = e == 0 ? 0.f : de / e, w = e * per_energy;
      const bool key = a.tied && at.kept(a.key_mask, token);
      const float dt = key ? simt::load_written(a.dscores + at.head(a) * a.N + token) : 0.f;
      for (int i = 0; i < kLaneElements; ++i) {
        float g = live[u] ? w * dqbar[i] + along * x[i] : 0.f;
        if (key) g += dt * qbar[i];
        x[i] = a.scale * g;
      }
      dq_rows.store(token, x);
    }
  }
}

// The two passes of a direction, by one body for both ways of running them.
template <typename T, bool kAligned, bool kBackward> struct Passes {
  const LinearArgs& a;
  const Shared& shared;

  INFSA_DEVICE void first(int64_t unit, int64_t split, float* part) const {
    const Place at(a, unit);
    Sums sums;
    if constexpr (kBackward) {
      sums = keys_backward<T, kAligned>(a, at, split);
    } else {
      sums = sum_queries<T, kAligned>(a, at, split, kept());
    }
    reduce_block(a.plan, sums, shared.reduce, part);
  }
  INFSA_DEVICE void second(int64_t unit, int64_t split, float* part) const {
    const Place at(a, unit);
    if constexpr (kBackward) {
      if (a.dq.data) queries_backward<T, kAligned>(a, at, split, shared);
    } else {
      float qbar[kLaneElements];
      central_query(a, at, shared, split == 0, qbar);
      reduce_block(a.plan, sum_keys<T, kAligned>(a, at, split, qbar, kept()), shared.reduce, part);
    }
  }
  INFSA_DEVICE Raw<T>* kept() const {
    return a.plan.cluster && a.tied ? static_cast<Raw<T>*>(shared.queries) : nullptr;
  }
};

// A cluster per unit: everything between the first read and the result stays on chip.
template <typename T, bool kAligned, bool kBackward>
INFSA_DEVICE void linear_cluster(const LinearArgs& a, void* memory) {
  const Shared shared(memory);
  const Passes<T, kAligned, kBackward> passes{a, shared};
  const int64_t unit = simt::block() / a.plan.splits, rank = simt::block() % a.plan.splits;
  passes.first(unit, rank, shared.first);
  sum_cluster(a.plan, shared.first, shared);
  passes.second(unit, rank, shared.second);
  if constexpr (!kBackward) {
    simt::sync();
    sum_cluster(a.plan, shared.second, shared);
    if (rank == 0) store_result<T>(a, Place(a, unit), shared);
  }
  // No block may leave while another reads its shared memory.
  simt::cluster_sync();
}

// One resident grid, a wave of units after the other. The first pass of a wave runs between the arrival of the wave
// before at the barrier and that wave's second pass, which hides the barrier; Q comes back from the L2 cache.
template <typename T, bool kAligned, bool kBackward>
INFSA_DEVICE void linear_grid(const LinearArgs& a, void* memory, simt::GridBarrier& barrier) {
  const LinearPlan& p = a.plan;
  const Shared shared(memory);
  const Passes<T, kAligned, kBackward> passes{a, shared};
  const int64_t in_wave = simt::block() / p.splits, split = simt::block() % p.splits, size = p.part_size();
  // The parts of a unit are written in one step, read in the next, and their place is not taken before the one after
  // that.
  const auto parts = [&](float* of_pass, int64_t wave) {
    return of_pass + (wave % kRing * p.wave_units + in_wave) * p.splits * size;
  };
  for (int64_t step = 0; step < p.waves + (kBackward ? 1 : 2); ++step) {
    const int64_t unit = step * p.wave_units + in_wave, before = unit - p.wave_units, done = before - p.wave_units;
    if (unit < p.units) passes.first(unit, split, parts(a.first_parts, step) + split * size);
    barrier.arrive();
    // What it waits for is the first pass of this wave; the second pass of the one before needs nothing of it.
    if (step >= 1 && before < p.units) {
      sum_parts(p, parts(a.first_parts, step - 1), p.splits, shared);
      passes.second(before, split, kBackward ? nullptr : parts(a.second_parts, step - 1) + split * size);
    }
    barrier.wait();
    if constexpr (!kBackward) {
      if (step >= 2 && done < p.units && split == 0) {
        sum_parts(p, parts(a.second_parts, step - 2), p.splits, shared);
        store_result<T>(a, Place(a, done), shared);
      }
    }
  }
}

}  // namespace infsa::cuda
