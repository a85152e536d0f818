// How Linear-InfSA's work is cut on a GPU: plain integers, the same for the device, its launcher and the tests.
#pragma once

#include <cstdint>

#include "../rows.h"

#ifdef __CUDACC__
#define INFSA_ANYWHERE __host__ __device__
#else
#define INFSA_ANYWHERE
#endif

namespace infsa::cuda {

// Two blocks of this size fit on a multiprocessor with 128 registers a thread: one works while the other is at a
// barrier.
constexpr int kThreads = 256;
constexpr int kBlocksAtOnce = 2;
constexpr int kWarps = kThreads / 32;
// Elements of a row that one lane holds: 16 bytes of a 2-byte type, two loads of 16 bytes of float32.
constexpr int kLaneElements = 8;
constexpr int kLargestHeadDim = 32 * kLaneElements;
// Tokens are counted in 32 bits, with room for a group beyond the last.
constexpr int64_t kMostTokens = int64_t{1} << 30;
// Tokens that a thread should have to itself, before another block is worth its part of the sums.
constexpr int kThreadTokens = 8;
// More than 8 blocks in a cluster are not portable.
constexpr int kLargestCluster = 8;
// Waves whose partial sums are in memory at once.
constexpr int kRing = 3;

// A unit is a batch's head group: `heads` heads, `lanes` lanes each, `heads * lanes` <= 32 columns of threads.
struct LinearPlan {
  int lanes, heads, columns, slots;  // slots: tokens that a block takes at a time
  int64_t units, unit_groups;        // unit_groups: units of one batch
  int64_t splits;                    // blocks of a unit: of its cluster, or of its part of the grid
  int64_t query_span, key_span;      // tokens of one split
  int64_t wave_units, waves;         // units between two barriers of the grid
  int blocks;
  bool cluster;  // a cluster per unit, partial sums in its distributed shared memory; else one cooperative grid
  bool floor;    // the second pass of forward has a second part, of the floor's sums
  int shared_bytes;

  // floats of a partial sum: a row of every head, then a weight of every head
  INFSA_ANYWHERE int part_size() const { return columns * kLaneElements + heads; }
  INFSA_ANYWHERE int second_size() const { return floor ? 2 * part_size() : part_size(); }
  // floats of the partial sums of one pass in global memory
  int64_t parts_size() const { return cluster ? 0 : kRing * wave_units * splits * second_size(); }
};

constexpr int kLargestPart = 32 * kLaneElements + 32;
constexpr int kReduceFloats = kWarps * 32 * (kLaneElements + 1);
// floats of shared memory that a block has beside rows: a total and a part of either pass, and the floor's
INFSA_ANYWHERE constexpr int shared_floats(bool floor) { return kReduceFloats + (floor ? 5 : 3) * kLargestPart; }

struct LinearDevice {
  int resident_blocks;     // that run at once
  int64_t largest_shared;  // bytes of shared memory that a block of a cluster may have; 0 where there are no clusters
  int64_t wave_bytes;      // of Q between two barriers: the L2 cache holds it and its successor while V passes by
};

inline int64_t power_of_two(int64_t at_least) {
  int64_t n = 1;
  while (n < at_least) n *= 2;
  return n;
}

inline int64_t clamp(int64_t x, int64_t least, int64_t most) { return x < least ? least : x > most ? most : x; }

// token_major: the heads of a token lie side by side. keep_queries: a cluster holds Q on chip between its two passes.
// floor: of forward only.
inline LinearPlan linear_plan(int64_t B, int64_t H, int64_t N, int64_t M, int64_t d, int64_t d_v, int element_bytes,
                              bool token_major, bool keep_queries, bool floor, LinearDevice device) {
  LinearPlan p{};
  p.floor = floor;
  p.lanes = static_cast<int>(power_of_two(ceil_div(d > d_v ? d : d_v, kLaneElements)));
  p.heads = 1;
  // A whole line of 128 bytes of a token.
  while (token_major && p.heads < H && p.heads * 2 * p.lanes <= 32 && p.heads * d * element_bytes < 128) p.heads *= 2;
  p.columns = p.lanes * p.heads;
  p.slots = kThreads / p.columns;
  p.unit_groups = ceil_div(H, p.heads);
  p.units = B * p.unit_groups;
  const int64_t longest = N > M ? N : M;
  const int64_t most_splits = clamp(ceil_div(longest, int64_t{p.slots} * kThreadTokens), 1, INT64_MAX);

  const int64_t row_bytes = int64_t{p.columns} * kLaneElements * element_bytes;
  const int64_t cluster_splits = clamp(power_of_two(most_splits), 1, kLargestCluster);
  const int64_t shared = shared_floats(floor) * 4;
  const int64_t cluster_shared = shared + (keep_queries ? ceil_div(N, cluster_splits) * row_bytes : 0);
  // What is longer than would fit on chip keeps the whole GPU busy as one grid.
  p.cluster = shared + ceil_div(longest, cluster_splits) * row_bytes <= device.largest_shared &&
              p.units <= INT32_MAX / cluster_splits;
  if (p.cluster) {
    p.splits = cluster_splits;
    p.wave_units = p.units, p.waves = 1;
    p.shared_bytes = static_cast<int>(cluster_shared);
  } else {
    const int64_t unit_bytes = clamp(N * row_bytes, 1, INT64_MAX);
    p.wave_units =
        clamp(device.wave_bytes / unit_bytes, 1, p.units < device.resident_blocks ? p.units : device.resident_blocks);
    p.splits = clamp(device.resident_blocks / p.wave_units, 1, most_splits);
    p.waves = ceil_div(p.units, p.wave_units);
    p.shared_bytes = static_cast<int>(shared);
  }
  p.blocks = static_cast<int>(p.wave_units * p.splits);
  p.query_span = ceil_div(N, p.splits);
  p.key_span = ceil_div(M, p.splits);
  return p;
}

}  // namespace infsa::cuda
