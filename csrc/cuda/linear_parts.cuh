// What the passes of Linear-InfSA share on the device: a thread's place, sums, and how a block's become a head's. The
// includer provides simt.cuh's primitives.
#pragma once

#include "lanes.cuh"
#include "linear.h"

namespace infsa::cuda {

// This lane's part of a product.
INFSA_DEVICE float dot(const float* a, const float* b) {
  float x = 0;
  for (int i = 0; i < kLaneElements; ++i) x += a[i] * b[i];
  return x;
}

// Sums over the lanes of a head, of several rows at once: their shuffles hide each other's latency, and the loop over a
// number of lanes that only the launch knows is theirs together.
template <int kCount> INFSA_DEVICE void sum_lanes(float (&x)[kCount], int lanes) {
  for (int m = 1; m < lanes; m *= 2) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) x[u] += simt::shuffle_xor(x[u], m);
  }
}

INFSA_DEVICE float dot(const float* a, const float* b, int lanes) {
  float x[1] = {dot(a, b)};
  sum_lanes(x, lanes);
  return x[0];
}

constexpr float kLargestFloat = 3.402823466e38f, kLeastNormal = 1.17549435e-38f;

// 1 / sqrt(x) to the last bit or two, without the branches of IEEE's root and quotient: one step of Newton's method. 0
// for what is less than the least normal number.
INFSA_DEVICE float inverse_root(float x) {
  const float y = x < kLeastNormal ? 0.f : simt::rough_inverse_root(x);
  return y + 0.5f * y * (1 - x * y * y);
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
  float* floor_total;  // `second` is of twice the size with it
  void* queries;
  INFSA_DEVICE Shared(void* memory, bool floor) : reduce(static_cast<float*>(memory)) {
    total = reduce + kReduceFloats, first = total + kLargestPart, second = first + kLargestPart;
    floor_total = second + 2 * kLargestPart;
    queries = reduce + shared_floats(floor);
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
  for (int at = simt::thread(); at < size; at += kThreads) {
    float x = 0;
    for (int w = 0; w < kWarps; ++w) x += reduce[w * size + at];
    part[at] = x;
  }
}

// total = sum of `count` parts in global memory, `stride` floats apart.
INFSA_DEVICE void sum_parts(const LinearPlan& p, const float* parts, int64_t count, int64_t stride,
                            const Shared& shared, float* total) {
  const int size = p.part_size(), rows = size < kThreads ? kThreads / size : 1;
  simt::sync();
  for (int item = simt::thread(); item < rows * size; item += kThreads) {
    const int row = item / size, at = item % size;
    float x = 0;
    for (int64_t i = row; i < count; i += rows) x += simt::load_written(parts + i * stride + at);
    shared.reduce[item] = x;
  }
  simt::sync();
  for (int at = simt::thread(); at < size; at += kThreads) {
    float x = 0;
    for (int r = 0; r < rows; ++r) x += shared.reduce[r * size + at];
    total[at] = x;
  }
  simt::sync();
}

// total = sum of a part of every block of the cluster, all of which have written theirs.
INFSA_DEVICE void sum_cluster(const LinearPlan& p, float* part, float* total) {
  for (int at = simt::thread(); at < p.part_size(); at += kThreads) {
    float x = 0;
    for (int r = 0; r < p.splits; ++r) x += simt::of_block(part, r)[at];
    total[at] = x;
  }
  simt::sync();
}

INFSA_DEVICE void total_row(const LinearPlan& p, const Place& at, const float* total, float* x, float& weight) {
  for (int i = 0; i < kLaneElements; ++i) x[i] = total[(at.in_group * p.lanes + at.lane) * kLaneElements + i];
  weight = total[p.columns * kLaneElements + at.in_group];
}

INFSA_DEVICE void load_head(const LinearArgs& a, const Place& at, const float* heads, int size, float* x) {
  for (int i = 0; i < kLaneElements; ++i) {
    x[i] = at.exists && at.column + i < size ? heads[at.head(a) * size + at.column + i] : 0.f;
  }
}

INFSA_DEVICE float rho_of(const LinearArgs& a, const Place& at) {
  return a.rho * (a.head_rho && at.exists ? a.head_rho[at.b * a.rho_b + at.h * a.rho_h] : 1.f);
}

// The keys of a batch that no mask ignores, by all threads of a block; at least 1.
INFSA_DEVICE float count_keys(const LinearArgs& a, const Place& at, const Shared& shared) {
  const Kept counts(a.key_mask, at.b);
  if (counts.all()) return a.M > 1 ? static_cast<float>(a.M) : 1.f;
  int here = 0;
#pragma unroll 8
  for (int token = simt::thread(); token < a.M; token += kThreads) here += counts(token);
  float x[1] = {static_cast<float>(here)};
  sum_lanes(x, 32);
  simt::sync();
  if (simt::thread() % 32 == 0) shared.reduce[simt::thread() / 32] = x[0];
  simt::sync();
  x[0] = 0;
  for (int w = 0; w < kWarps; ++w) x[0] += shared.reduce[w];
  simt::sync();
  return x[0] > 1 ? x[0] : 1.f;
}

}  // namespace infsa::cuda
