// The CUDA runtime that csrc/cuda/linear.cu asks, as a GPU of the test's making answers: its host code runs without
// one.
#pragma once

#include <cstddef>
#include <cstdint>

#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorCooperativeLaunchTooLarge };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrClusterLaunch,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrL2CacheSize,
};
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeCooperative };

using cudaStream_t = struct CUstream_st*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaFuncAttributes {
  int ptxVersion;
};

// What the GPU is, and what it was asked to launch.
struct Gpu {
  int64_t ptx_version, has_clusters, active_clusters, blocks_at_once, launch;  // launch: a cudaError_t
  int64_t blocks, threads, shared, cluster, cooperative, errors_left;
};
inline Gpu gpu;

inline cudaError_t answer(cudaError_t error) {
  if (error) gpu.errors_left = 1;
  return error;
}
inline cudaError_t cudaGetLastError() { return gpu.errors_left = 0, cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "the driver's words"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  const int64_t values[] = {100, gpu.has_clusters, 227 << 10, 40 << 20};
  return *value = static_cast<int>(values[name]), cudaSuccess;
}
template <typename Kernel> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, Kernel) {
  if (gpu.ptx_version == 0) return answer(cudaErrorInvalidValue);
  return found->ptxVersion = static_cast<int>(gpu.ptx_version), cudaSuccess;
}
template <typename Kernel> cudaError_t cudaFuncSetAttribute(Kernel, int, int) { return cudaSuccess; }
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t*) {
  if (gpu.active_clusters < 0) return answer(cudaErrorInvalidValue);
  return *clusters = static_cast<int>(gpu.active_clusters), cudaSuccess;
}
template <typename Kernel> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = static_cast<int>(gpu.blocks_at_once), cudaSuccess;
}
template <typename Kernel, typename Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel, const Arguments&) {
  gpu.blocks = config->gridDim.x, gpu.threads = config->blockDim.x, gpu.shared = config->dynamicSmemBytes;
  const cudaLaunchAttribute& how = config->attrs[0];
  gpu.cooperative = how.id == cudaLaunchAttributeCooperative;
  gpu.cluster = gpu.cooperative ? 0 : how.val.clusterDim.x;
  return answer(static_cast<cudaError_t>(gpu.launch));
}
