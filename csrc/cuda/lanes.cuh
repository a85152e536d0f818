// A lane's part of rows: 8 elements, 16 bytes at a time where the rows are aligned. The includer provides simt.cuh's
// primitives.
#pragma once

#include "linear_plan.h"

namespace infsa::cuda {

// A lane's 8 elements of a row as they are in memory: whole words, of which no instruction has to pick halves.
template <typename T> struct alignas(16) Raw {
  static constexpr int kWords = kLaneElements * sizeof(T) / 4;
  uint32_t words[kWords];
};

struct alignas(16) Chunk {
  uint32_t words[4];
};

// Rows of a tensor that a thread has on their way at once, of every tensor that a pass reads: enough bytes to cover the
// memory's latency, in the registers that there are.
template <typename T, bool kAligned, bool kFew> constexpr int kRowsAhead =
    kAligned ? (kFew ? 32 : 64) / sizeof(Raw<T>) : 1;

template <typename T> INFSA_DEVICE void widen(const Raw<T>& raw, float* x) { simt::to_floats<T>(raw.words, x); }

// How a lane reads and writes its part of one row: 16 bytes at a time if aligned, else element by element.
template <typename T, bool kAligned> struct Lane {
  T* data;
  int64_t token, channel;  // strides
  int count;               // elements

  // What lies outside the head stays as it is, or becomes 0.
  INFSA_DEVICE void load(const T* p, Raw<T>& raw) const {
    if constexpr (kAligned) {
      if (count > 0) {
        for (int i = 0; i < Raw<T>::kWords / 4; ++i) {
          const Chunk chunk = reinterpret_cast<const Chunk*>(p)[i];
          for (int j = 0; j < 4; ++j) raw.words[4 * i + j] = chunk.words[j];
        }
      }
    } else {
      T x[kLaneElements] = {};
      for (int i = 0; i < kLaneElements; ++i) {
        if (i < count) x[i] = p[i * channel];
      }
      __builtin_memcpy(raw.words, x, sizeof x);
    }
  }
  INFSA_DEVICE void store(T* p, const float* x) const {
    Raw<T> raw;
    simt::from_floats<T>(x, raw.words);
    if constexpr (kAligned) {
      if (count > 0) {
        for (int i = 0; i < Raw<T>::kWords / 4; ++i) {
          Chunk chunk;
          for (int j = 0; j < 4; ++j) chunk.words[j] = raw.words[4 * i + j];
          reinterpret_cast<Chunk*>(p)[i] = chunk;
        }
      }
    } else {
      T narrow[kLaneElements];
      __builtin_memcpy(narrow, raw.words, sizeof narrow);
      for (int i = 0; i < kLaneElements; ++i) {
        if (i < count) p[i * channel] = narrow[i];
      }
    }
  }
};

// The tokens of one pass that a thread takes: a group of kAhead, `stride` apart, then the next group. Shuffles need
// whole warps, so every thread of a block walks over as many groups.
template <int kAhead> struct Tokens {
  int at, to, stride;  // of the group's first

  INFSA_DEVICE Tokens(int64_t split, int64_t span, int64_t size, int slot, int stride) : stride(stride) {
    const int64_t from = split * span < size ? split * span : size, end = from + span < size ? from + span : size;
    at = static_cast<int>(from) + slot, to = static_cast<int>(end);
    left_ = to - static_cast<int>(from);
  }
  INFSA_DEVICE bool any() const { return left_ > 0; }
  // Whether every thread has all tokens of the group.
  INFSA_DEVICE bool whole() const { return left_ >= kAhead * stride; }
  INFSA_DEVICE bool has(int u) const { return at + u * stride < to; }
  INFSA_DEVICE void next() { at += kAhead * stride, left_ -= kAhead * stride; }

 private:
  int left_;  // of the block, from the group on: the same in all its threads
};

// A thread's rows of one tensor, one token after the other.
template <typename T, bool kAligned> struct Cursor {
  Lane<T, kAligned> lane;
  T* next;
  int64_t step;  // elements from a token to the thread's next one

  template <int kAhead> INFSA_DEVICE Cursor(const Lane<T, kAligned>& lane, const Tokens<kAhead>& tokens)
      : lane(lane), next(lane.data + tokens.at * lane.token), step(simt::computed(tokens.stride * lane.token)) {}

  INFSA_DEVICE void load(Raw<T>& raw) { lane.load(next, raw), next += step; }
  INFSA_DEVICE void load(Raw<T>& raw, bool live) {
    raw = Raw<T>{};
    if (live) lane.load(next, raw);
    next += step;
  }
  INFSA_DEVICE void store(const float* x, bool wanted) {
    if (wanted) lane.store(next, x);
    next += step;
  }
};

// A mask at a thread's tokens.
struct Kept {
  const bool* ignored;
  int64_t token;

  INFSA_DEVICE Kept(const Mask& mask, int64_t b)
      : ignored(mask.data ? mask.data + b * mask.batch : nullptr), token(mask.token) {}
  INFSA_DEVICE bool all() const { return !ignored; }
  INFSA_DEVICE bool operator()(int at) const { return !ignored || !ignored[at * token]; }
};

// Runs a pass, whose first group has been loaded: `add` takes a group, `load` fetches the next one. Both come twice,
// for groups of which every token counts and for others; which it is is the same for the whole block.
template <typename Pass> INFSA_DEVICE void load_group(Pass& pass) {
  if (pass.whole()) {
    pass.template load<true>();
  } else if (pass.tokens.any()) {
    pass.template load<false>();
  }
}
template <typename Pass> INFSA_DEVICE void walk(Pass& pass) {
  while (pass.tokens.any()) {
    if (pass.whole()) {
      pass.template add<true>();
    } else {
      pass.template add<false>();
    }
    pass.tokens.next();
    load_group(pass);
  }
}

}  // namespace infsa::cuda
