// The extension module `infsa_kernels._C`: how the library of kernels beside it was built, for infsa_kernels/info.py,
// and the memory that it keeps. It holds no operator: those are the library's (torch.ops.load_library).
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include "library.h"

// setup.py defines INFSA_CUDA_ARCH_LIST, as 8.0,9.0a, where it compiles csrc/cuda.
#define INFSA_STRING(...) #__VA_ARGS__
#define INFSA_STRING_OF(...) INFSA_STRING(__VA_ARGS__)
#ifndef INFSA_CUDA_ARCH_LIST
#define INFSA_CUDA_ARCH_LIST
#endif

PYBIND11_MODULE(_C, m) {
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("compiler") = __VERSION__;
  m.attr("cpu_isa") = infsa::cpu::isa_name();
  m.attr("cuda_arch_list") = INFSA_STRING_OF(INFSA_CUDA_ARCH_LIST);
  m.def("release_memory", infsa::cpu::release_memory);
  m.def("kept_memory", infsa::cpu::kept_memory);
  m.def("most_kept_memory", infsa::cpu::most_kept_memory);
}
