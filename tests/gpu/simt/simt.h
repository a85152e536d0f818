// The primitives of csrc/cuda/simt.cuh on the host: every CUDA thread is a fiber, and fibers run in an order drawn at
// random.
//
// A fiber gives way only where CUDA threads wait for each other; some warps run often and some seldom, so that what is
// only by luck in time is too late somewhere. Shared memory is NaN before a block writes it and after the block has
// left. If no fiber can go on, as after a barrier that not every thread reaches, the run ends with an error.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#define INFSA_DEVICE inline

namespace infsa::cuda {

struct BFloat16 {
  uint16_t bits;
};
using Float16 = _Float16;

inline void round_to(float& to, float x) { to = x; }
inline void round_to(Float16& to, float x) { to = static_cast<Float16>(x); }
inline void round_to(BFloat16& to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // To nearest, ties to even; a NaN keeps its high bits.
  if (x == x) bits += 0x7fff + (bits >> 16 & 1);
  to.bits = static_cast<uint16_t>(bits >> 16);
}

namespace simt {

inline float to_float(float x) { return x; }
inline float to_float(Float16 x) { return static_cast<float>(x); }
inline float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
template <typename T, int kWords> void to_floats(const uint32_t (&words)[kWords], float* to) {
  constexpr int kCount = kWords * 4 / sizeof(T);
  T x[kCount];
  std::memcpy(x, words, sizeof x);
  for (int i = 0; i < kCount; ++i) to[i] = to_float(x[i]);
}
template <typename T, int kWords> void from_floats(const float* x, uint32_t (&words)[kWords]) {
  constexpr int kCount = kWords * 4 / sizeof(T);
  T narrow[kCount];
  for (int i = 0; i < kCount; ++i) round_to(narrow[i], x[i]);
  std::memcpy(words, narrow, sizeof narrow);
}
inline int64_t computed(int64_t x) { return x; }

// Off by as much as a GPU's may be.
inline float rough_inverse_root(float x) { return (1 + 0x1p-23f) / std::sqrt(x < 1.17549435e-38f ? 0 : x); }

struct Barrier {
  int size = 0, arrived = 0;
  int64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  float values[32];
  // Of its turns, how many it does not let pass.
  double speed;
};

struct Block {
  Barrier barrier;
  int live;
  std::vector<float> shared;
  std::vector<Warp> warps;
};

struct Fiber {
  // Where it begins, and where it went on from; switching by the first costs a system call.
  ucontext_t context;
  jmp_buf place;
  bool begun = false;
  std::unique_ptr<char[]> stack;
  int block, thread;
  // What it waits for: that a barrier's generation is no longer this one.
  Barrier* barrier = nullptr;
  int64_t generation = 0;
  bool done = false;
};

// One launch.
class Machine {
 public:
  Machine(int blocks, int threads, int cluster, int shared_bytes, uint64_t seed)
      : threads_(threads), cluster_(cluster), blocks_(blocks), clusters_(blocks / cluster), random_(seed) {
    for (Block& block : blocks_) {
      block.barrier.size = block.live = threads;
      block.shared.assign(shared_bytes / 4, NAN);
      block.warps.resize(threads / 32);
      const double speed = draw_speed();
      for (Warp& warp : block.warps) warp.barrier.size = 32, warp.speed = speed * draw_speed();
    }
    for (Barrier& barrier : clusters_) barrier.size = cluster * threads;
    grid_.size = blocks * threads;
  }

  void run(const std::function<void(void*)>& body) {
    current() = this;
    body_ = &body;
    constexpr int kStackBytes = 1 << 15;
    fibers_.resize(blocks_.size() * threads_);
    std::vector<Fiber*> live;
    for (size_t i = 0; i < fibers_.size(); ++i) {
      Fiber& fiber = fibers_[i];
      fiber.block = static_cast<int>(i / threads_), fiber.thread = static_cast<int>(i % threads_);
      fiber.stack.reset(new char[kStackBytes]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, enter, 0);
      live.push_back(&fiber);
    }
    while (!live.empty()) {
      std::shuffle(live.begin(), live.end(), random_);
      bool possible = false;
      for (Fiber* fiber : live) {
        if (fiber->barrier && fiber->barrier->generation == fiber->generation) continue;
        possible = true;
        fiber_ = fiber;
        if (uniform_(random_) > warp().speed) continue;
        fiber->barrier = nullptr;
        resume(*fiber);
      }
      if (!possible) throw std::runtime_error("every thread waits for another");
      std::erase_if(live, [](Fiber* fiber) { return fiber->done; });
    }
    current() = nullptr;
  }

  static Machine*& current() {
    static Machine* machine = nullptr;
    return machine;
  }
  Fiber& fiber() { return *fiber_; }
  Block& block() { return blocks_[fiber_->block]; }
  Warp& warp() { return block().warps[fiber_->thread / 32]; }
  Barrier& cluster() { return clusters_[fiber_->block / cluster_]; }
  Barrier& grid() { return grid_; }

  // Returns the generation that ends when all have arrived.
  int64_t arrive(Barrier& barrier) {
    const int64_t generation = barrier.generation;
    if (++barrier.arrived == barrier.size) ++barrier.generation, barrier.arrived = 0;
    return generation;
  }
  void wait(Barrier& barrier, int64_t generation) {
    fiber_->barrier = &barrier, fiber_->generation = generation;
    if (_setjmp(fiber_->place) == 0) _longjmp(scheduler_, 1);
  }
  void sync(Barrier& barrier) { wait(barrier, arrive(barrier)); }

  const float* of_block(const float* shared, int rank) {
    const int64_t at = shared - block().shared.data();
    if (at < 0 || at >= static_cast<int64_t>(block().shared.size())) throw std::runtime_error("not shared memory");
    return blocks_[fiber_->block / cluster_ * cluster_ + rank].shared.data() + at;
  }

 private:
  static void enter() {
    Machine& machine = *current();
    Fiber& fiber = machine.fiber();
    (*machine.body_)(machine.block().shared.data());
    fiber.done = true;
    Block& block = machine.block();
    if (--block.live == 0) std::fill(block.shared.begin(), block.shared.end(), NAN);
    _longjmp(machine.scheduler_, 1);
  }
  void resume(Fiber& fiber) {
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
  }
  double draw_speed() { return uniform_(random_) < 0.5 ? 1 : 0.25; }

  int threads_, cluster_;
  std::vector<Block> blocks_;
  std::vector<Barrier> clusters_;
  Barrier grid_;
  std::mt19937_64 random_;
  std::uniform_real_distribution<> uniform_;
  std::vector<Fiber> fibers_;
  Fiber* fiber_ = nullptr;
  jmp_buf scheduler_;
  const std::function<void(void*)>* body_ = nullptr;
};

inline Machine& machine() { return *Machine::current(); }

inline int thread() { return machine().fiber().thread; }
inline int block() { return machine().fiber().block; }
inline void sync() { machine().sync(machine().block().barrier); }
inline void cluster_sync() { machine().sync(machine().cluster()); }
inline float load_written(const float* p) { return *p; }
inline const float* of_block(float* shared, int rank) { return machine().of_block(shared, rank); }

inline float shuffle_xor(float x, int lanes) {
  Warp& warp = machine().warp();
  const int lane = thread() % 32;
  warp.values[lane] = x;
  machine().sync(warp.barrier);
  const float other = warp.values[lane ^ lanes];
  machine().sync(warp.barrier);
  return other;
}

struct GridBarrier {
  int64_t generation = 0;
  void arrive() { generation = machine().arrive(machine().grid()); }
  void wait() { machine().wait(machine().grid(), generation); }
};

}  // namespace simt
}  // namespace infsa::cuda
