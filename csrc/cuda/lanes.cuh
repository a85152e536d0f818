// A lane's part of a row: 8 elements, 16 bytes at a time where the rows are aligned. The includer provides simt.cuh's
// primitives.
#pragma once

#include "linear_plan.h"

namespace infsa::cuda {

struct alignas(16) Chunk {
  uint32_t words[4];
};

// A lane's 8 elements of a row as they are in memory.
template <typename T> struct alignas(16) Raw {
  T x[kLaneElements];
};

// Rows that a thread has on their way at once, of every tensor that a pass reads: enough bytes to cover the memory's
// latency, in the registers that there are.
template <typename T, bool kAligned, bool kBackward> constexpr int kRowsAhead =
    kAligned ? (kBackward ? 32 : 64) / sizeof(Raw<T>) : 1;

// A lane's part of the rows of one head: 16 bytes at a time if aligned, else element by element.
template <typename T, bool kAligned> struct Lane {
  T* data;
  int64_t token, channel;  // strides
  int count;               // elements

  INFSA_DEVICE Raw<T> load(int64_t at) const {
    Raw<T> raw{};
    const T* p = data + at * token;
    if constexpr (kAligned) {
      for (int i = 0; i < kChunks; ++i) {
        if (count > 0) reinterpret_cast<Chunk*>(raw.x)[i] = reinterpret_cast<const Chunk*>(p)[i];
      }
    } else {
      for (int i = 0; i < kLaneElements; ++i) {
        if (i < count) raw.x[i] = p[i * channel];
      }
    }
    return raw;
  }
  INFSA_DEVICE void store(int64_t at, const float* x) const {
    Raw<T> raw;
    T* p = data + at * token;
    for (int i = 0; i < kLaneElements; ++i) round_to(raw.x[i], x[i]);
    if constexpr (kAligned) {
      for (int i = 0; i < kChunks; ++i) {
        if (count > 0) reinterpret_cast<Chunk*>(p)[i] = reinterpret_cast<const Chunk*>(raw.x)[i];
      }
    } else {
      for (int i = 0; i < kLaneElements; ++i) {
        if (i < count) p[i * channel] = raw.x[i];
      }
    }
  }
  static constexpr int kChunks = sizeof(Raw<T>) / sizeof(Chunk);
};

template <typename T> INFSA_DEVICE void widen(const Raw<T>& raw, bool live, float* x) {
  simt::to_floats(raw.x, x);
  for (int i = 0; i < kLaneElements; ++i) x[i] = live ? x[i] : 0.f;
}

}  // namespace infsa::cuda
