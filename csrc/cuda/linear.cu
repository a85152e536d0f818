// Launches of Linear-InfSA's kernels (linear_kernels.cuh): forward and backward are one launch each.
#include <cuda_runtime.h>

#include <algorithm>

// The kernels are written in its primitives.
#include "simt.cuh"
//
#include "linear_kernels.cuh"

namespace infsa::cuda {
namespace {

extern __shared__ __align__(16) char dynamic_shared[];

template <typename T, bool kAligned, bool kBackward, bool kFloor>
__global__ __launch_bounds__(kThreads, kBlocksAtOnce) void linear_grid_kernel(const __grid_constant__ LinearArgs a) {
  simt::GridBarrier barrier;
  linear_grid<T, kAligned, kBackward, kFloor>(a, dynamic_shared, barrier);
}

template <typename T, bool kAligned, bool kBackward, bool kFloor>
__global__ __launch_bounds__(kThreads, kBlocksAtOnce) void linear_cluster_kernel(const __grid_constant__ LinearArgs a) {
#if __CUDA_ARCH__ >= 900
  linear_cluster<T, kAligned, kBackward, kFloor>(a, dynamic_shared);
#endif
}

using Kernel = void (*)(LinearArgs);

struct Kernels {
  Kernel grid, cluster;
};

template <typename T, bool kAligned, bool kBackward> Kernels kernels_of(bool floored) {
  if (floored) {
    return {linear_grid_kernel<T, kAligned, kBackward, true>, linear_cluster_kernel<T, kAligned, kBackward, true>};
  }
  return {linear_grid_kernel<T, kAligned, kBackward, false>, linear_cluster_kernel<T, kAligned, kBackward, false>};
}

template <typename T, bool kAligned> Kernels kernels_of(bool backward, bool floored) {
  return backward ? kernels_of<T, kAligned, true>(floored) : kernels_of<T, kAligned, false>(floored);
}

template <typename T> Kernels kernels_of(LinearKind kind) {
  return kind.aligned ? kernels_of<T, true>(kind.backward, kind.floored)
                      : kernels_of<T, false>(kind.backward, kind.floored);
}

Kernels kernels_of(LinearKind kind) {
  switch (kind.element) {
    case Element::float32:
      return kernels_of<float>(kind);
    case Element::bfloat16:
      return kernels_of<BFloat16>(kind);
    default:
      return kernels_of<Float16>(kind);
  }
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  cudaDeviceGetAttribute(&value, name, device);
  return value;
}

cudaLaunchAttribute cluster_of(int64_t blocks) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  return cluster;
}

// An error that is reported or dealt with: whoever asks the runtime next would take it for its own.
void forget_error() { cudaGetLastError(); }

// Bytes of shared memory that a block of a cluster may have; 0 where the kernel has no body, as in code compiled from
// PTX for compute capability 8.0, or where the largest cluster does not fit into this GPU or this part of one.
int64_t largest_shared(Kernel cluster, int device) {
  cudaFuncAttributes compiled{};
  if (cudaFuncGetAttributes(&compiled, cluster)) return forget_error(), 0;
  if (compiled.ptxVersion < 90 || !attribute(cudaDevAttrClusterLaunch, device)) return 0;
  const int shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  // Once, for the largest plan: set at every launch, it would be another thread's as often as one's own.
  if (cudaFuncSetAttribute(cluster, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)) return forget_error(), 0;
  cudaLaunchAttribute size = cluster_of(kLargestCluster);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kLargestCluster), config.blockDim = dim3(kThreads), config.dynamicSmemBytes = shared;
  config.attrs = &size, config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, cluster, &config)) forget_error();
  return clusters > 0 ? shared : 0;
}

}  // namespace

LinearDevice linear_device(LinearKind kind) {
  int device = 0, blocks = 0;
  cudaGetDevice(&device);
  const Kernels kernels = kernels_of(kind);
  const int shared = shared_floats(kind.floored && !kind.backward) * 4;
  // Where it fails, as on a GPU that the kernels were not compiled for, the launch will say why.
  if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernels.grid, kThreads, shared)) forget_error();
  return {std::max(blocks, 1) * attribute(cudaDevAttrMultiProcessorCount, device),
          largest_shared(kernels.cluster, device), attribute(cudaDevAttrL2CacheSize, device) / 4};
}

LaunchFailure launch_linear(const LinearArgs& args, LinearKind kind, void* stream) {
  const LinearPlan& plan = args.plan;
  const Kernels kernels = kernels_of(kind);
  const Kernel kernel = plan.cluster ? kernels.cluster : kernels.grid;
  cudaLaunchAttribute attribute = cluster_of(plan.splits);
  if (!plan.cluster) {
    // Refused, rather than left to wait for ever, should the grid not be resident as a whole.
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.blocks), config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute, config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args);
  if (error == cudaSuccess) return {};
  forget_error();
  return {cudaGetErrorString(error), error == cudaErrorCooperativeLaunchTooLarge};
}

}  // namespace infsa::cuda
