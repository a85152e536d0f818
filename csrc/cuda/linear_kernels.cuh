// Linear-InfSA's device code; the equations are those of docs/linear.md, in its order.
//
// Every pass walks over tokens with the sums in registers and reduces them over the block once, at its end. Partial
// sums of blocks are added in their order by whoever needs the total: the bits depend on shape and device alone. The
// includer provides simt.cuh's primitives.
#pragma once

#include "linear_backward.cuh"
#include "linear_forward.cuh"

namespace infsa::cuda {

// The two passes of a direction, by one body for both ways of running them. `total` adds up the parts of the first
// pass, while rows of the second are on their way.
template <typename T, bool kAligned, bool kBackward, bool kFloor> struct Passes {
  const LinearArgs& a;
  const Shared& shared;

  INFSA_DEVICE void first(int64_t unit, int64_t split, float* part) const {
    const Place at(a, unit);
    Sums sums;
    if constexpr (kBackward) {
      KeyGradientPass<T, kAligned, kFloor> pass(a, at, split, shared);
      walk(pass);
      sums = pass.sums;
    } else {
      EnergyPass<T, kAligned> pass(a, at, split, kept());
      walk(pass);
      sums = pass.sums;
    }
    reduce_block(a.plan, sums, shared.reduce, part);
  }
  template <typename Total>
  INFSA_DEVICE void second(int64_t unit, int64_t split, float* part, const Total& total) const {
    const Place at(a, unit);
    if constexpr (kBackward) {
      if (!a.dq.data) return total();
      QueryGradientPass<T, kAligned> pass(a, at, split);
      total();
      pass.with(shared);
      walk(pass);
    } else {
      ScorePass<T, kAligned, kFloor> pass(a, at, split, kept());
      total();
      central_query(a, at, shared, split == 0, pass.qbar);
      walk(pass);
      reduce_block(a.plan, pass.sums, shared.reduce, part);
      if constexpr (kFloor) reduce_block(a.plan, pass.floor, shared.reduce, part + a.plan.part_size());
    }
  }
  INFSA_DEVICE Raw<T>* kept() const {
    return a.plan.cluster && a.tied ? static_cast<Raw<T>*>(shared.queries) : nullptr;
  }
};

// A cluster per unit: everything between the first read and the result stays on chip.
template <typename T, bool kAligned, bool kBackward, bool kFloor>
INFSA_DEVICE void linear_cluster(const LinearArgs& a, void* memory) {
  const LinearPlan& p = a.plan;
  const Shared shared(memory, kFloor);
  const Passes<T, kAligned, kBackward, kFloor> passes{a, shared};
  const int64_t unit = simt::block() / p.splits, rank = simt::block() % p.splits;
  passes.first(unit, rank, shared.first);
  passes.second(unit, rank, shared.second, [&] {
    simt::cluster_sync();
    sum_cluster(p, shared.first, shared.total);
  });
  if constexpr (!kBackward) {
    simt::cluster_sync();
    sum_cluster(p, shared.second, shared.total);
    if constexpr (kFloor) sum_cluster(p, shared.second + p.part_size(), shared.floor_total);
    if (rank == 0) store_result<T, kFloor>(a, Place(a, unit), shared);
  }
  // No block may leave while another reads its shared memory.
  simt::cluster_sync();
}

// One resident grid, a wave of units after the other. The first pass of a wave runs between the arrival of the wave
// before at the barrier and that wave's second pass, which hides the barrier; Q comes back from the L2 cache.
template <typename T, bool kAligned, bool kBackward, bool kFloor>
INFSA_DEVICE void linear_grid(const LinearArgs& a, void* memory, simt::GridBarrier& barrier) {
  const LinearPlan& p = a.plan;
  const Shared shared(memory, kFloor);
  const Passes<T, kAligned, kBackward, kFloor> passes{a, shared};
  const int64_t in_wave = simt::block() / p.splits, split = simt::block() % p.splits;
  // The parts of a unit are written in one step, read in the next, and their place is not taken before the one after
  // that.
  const auto parts = [&](float* of_pass, int64_t wave, int64_t size) {
    return of_pass + (wave % kRing * p.wave_units + in_wave) * p.splits * size;
  };
  const int64_t first = p.part_size(), second = p.second_size();
  for (int64_t step = 0; step < p.waves + (kBackward ? 1 : 2); ++step) {
    const int64_t unit = step * p.wave_units + in_wave, before = unit - p.wave_units, done = before - p.wave_units;
    if (unit < p.units) passes.first(unit, split, parts(a.first_parts, step, first) + split * first);
    barrier.arrive();
    // What it waits for is the first pass of this wave; the second pass of the one before needs nothing of it.
    if (step >= 1 && before < p.units) {
      float* part = kBackward ? nullptr : parts(a.second_parts, step - 1, second) + split * second;
      passes.second(before, split, part, [&] {
        sum_parts(p, parts(a.first_parts, step - 1, first), p.splits, first, shared, shared.total);
      });
    }
    barrier.wait();
    if constexpr (!kBackward) {
      if (step >= 2 && done < p.units && split == 0) {
        const float* all = parts(a.second_parts, step - 2, second);
        sum_parts(p, all, p.splits, second, shared, shared.total);
        if constexpr (kFloor) sum_parts(p, all + first, p.splits, second, shared, shared.floor_total);
        store_result<T, kFloor>(a, Place(a, done), shared);
      }
    }
  }
}

}  // namespace infsa::cuda
