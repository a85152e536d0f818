// The launcher of Linear-InfSA (csrc/cuda/linear.cu, as shipped) with a GPU of the test's making, for
// tests/gpu/test_cuda_launches.py.
#include <cmath>
#include <compare>

#include "linear.cu"

using namespace infsa::cuda;

namespace {

// The least value of the runtime's that a launch needs, in the order of Gpu's members.
void make_gpu(const int64_t* made) { gpu = Gpu{made[0], made[1], made[2], made[3], made[4]}; }

}  // namespace

// device: resident blocks and bytes of shared memory of a cluster's block; returns whether an error was left behind.
extern "C" int64_t ask_device(const int64_t* made, int floored, int64_t* device) {
  make_gpu(made);
  const LinearDevice found = linear_device({Element::bfloat16, true, false, floored != 0});
  device[0] = found.resident_blocks, device[1] = found.largest_shared;
  return gpu.errors_left;
}

// Launches 16 heads of 64 channels as the operator does, on a GPU that takes grids of at most so many blocks: what was
// launched last, as blocks, threads, bytes of shared memory, cluster, cooperative; and how often. Returns whether it
// failed.
extern "C" int64_t launch(const int64_t* made, int64_t N, int64_t most_blocks, int64_t* launched) {
  make_gpu(made);
  LinearArgs a{};
  a.B = 1, a.H = 16, a.N = a.M = N, a.d = a.d_v = 64, a.tied = true;
  a.q = a.k = a.v = {nullptr, 16 * 64 * N, 64 * N, 64, 1};
  const LinearKind kind{Element::bfloat16, true, false, false};
  int64_t tries = 0;
  const LaunchFailure failure = launch_where_it_fits(linear_device(kind), [&](const LinearDevice& device) {
    ++tries;
    a.plan = linear_plan(a, kind.element, kind.backward, device);
    gpu.launch = !a.plan.cluster && a.plan.blocks > most_blocks ? cudaErrorCooperativeLaunchTooLarge : made[4];
    return launch_linear(a, kind, nullptr);
  });
  const int64_t found[] = {gpu.blocks, gpu.threads, gpu.shared, gpu.cluster, gpu.cooperative, tries, gpu.errors_left};
  for (int i = 0; i < 7; ++i) launched[i] = found[i];
  return failure.reason != nullptr;
}
