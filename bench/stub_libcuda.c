/* A libcuda.so.1 that starts nothing: bench/host.py measures with it what a call costs before the GPU has anything to do.
   Everything succeeds, memory is where it was said to be, and a kernel takes 64 registers. */
#include <stddef.h>
#include <stdint.h>

#define DONE(name, ...) int name(__VA_ARGS__) { return 0; }

static int launches;
int stub_launches(void) { return launches; }
int cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) { launches++; return 0; }

DONE(cuInit, unsigned flags)
DONE(cuCtxSetCurrent, void *context)
DONE(cuCtxSetLimit, int limit, size_t value)
DONE(cuFuncSetAttribute, void *function, int attribute, int value)
DONE(cuFuncSetCacheConfig, void *function, int config)
DONE(cuModuleUnload, void *module)
DONE(cuOccupancyMaxActiveClusters, int *clusters, void *function, const void *config)
DONE(cuTensorMapEncodeTiled, void *map)
DONE(cuTensorMapEncodeIm2col, void *map)

int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 227 << 10; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute ? 64 : 1024; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "error of the stub"; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)1; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { *(uint64_t *)data = pointer; return 0; }
int cuPointerGetAttributes(unsigned count, const int *attributes, void **data, uint64_t pointer) {
  for (unsigned i = 0; i < count; i++) *(uint64_t *)data[i] = pointer;
  return 0;
}
