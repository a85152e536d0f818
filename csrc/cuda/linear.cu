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

template <typename T, bool kAligned, bool kBackward>
__global__ __launch_bounds__(kThreads) void linear_grid_kernel(const __grid_constant__ LinearArgs a) {
  simt::GridBarrier barrier;
  linear_grid<T, kAligned, kBackward>(a, dynamic_shared, barrier);
}

template <typename T, bool kAligned, bool kBackward>
__global__ __launch_bounds__(kThreads) void linear_cluster_kernel(const __grid_constant__ LinearArgs a) {
#if __CUDA_ARCH__ >= 900
  linear_cluster<T, kAligned, kBackward>(a, dynamic_shared);
#endif
}

using Kernel = void (*)(LinearArgs);

struct Kernels {
  Kernel grid, cluster;
};

template <typename T, bool kAligned> Kernels kernels_of(bool backward) {
  if (backward) return {linear_grid_kernel<T, kAligned, true>, linear_cluster_kernel<T, kAligned, true>};
  return {linear_grid_kernel<T, kAligned, false>, linear_cluster_kernel<T, kAligned, false>};
}

Kernels kernels_of(Element element, bool aligned, bool backward) {
  switch (element) {
    case Element::float32:
      return aligned ? kernels_of<float, true>(backward) : kernels_of<float, false>(backward);
    case Element::bfloat16:
      return aligned ? kernels_of<BFloat16, true>(backward) : kernels_of<BFloat16, false>(backward);
    default:
      return aligned ? kernels_of<Float16, true>(backward) : kernels_of<Float16, false>(backward);
  }
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  cudaDeviceGetAttribute(&value, name, device);
  return value;
}

// An error that is reported or dealt with: whoever asks the runtime next would take it for its own.
void forget_error() { cudaGetLastError(); }

}  // namespace

LinearDevice linear_device(Element element, bool aligned, bool backward) {
  int device = 0, blocks = 0;
  cudaGetDevice(&device);
  const Kernels kernels = kernels_of(element, aligned, backward);
  // Where it fails, as on a GPU that the kernels were not compiled for, the launch will say why.
  if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernels.grid, kThreads, kSharedFloats * 4)) forget_error();
  const bool has_clusters = attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9;
  int shared = has_clusters ? attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) : 0;
  // Once, for the largest plan: set at every launch, it would be another thread's as often as one's own.
  if (shared > 0 && cudaFuncSetAttribute(kernels.cluster, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)) {
    forget_error();
    shared = 0;
  }
  return {std::max(blocks, 1) * attribute(cudaDevAttrMultiProcessorCount, device), shared,
          attribute(cudaDevAttrL2CacheSize, device) / 4};
}

const char* launch_linear(const LinearArgs& args, Element element, bool aligned, bool backward, void* stream) {
  const LinearPlan& plan = args.plan;
  const Kernels kernels = kernels_of(element, aligned, backward);
  const Kernel kernel = plan.cluster ? kernels.cluster : kernels.grid;
  cudaLaunchAttribute attribute{};
  if (plan.cluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = plan.splits, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  } else {
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
  if (error == cudaSuccess) return nullptr;
  forget_error();
  return cudaGetErrorString(error);
}

}  // namespace infsa::cuda
