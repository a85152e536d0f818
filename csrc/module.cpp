// The extension module `infsa_kernels._C`. Loading it runs the TORCH_LIBRARY_IMPL registrations of the other sources;
// the module itself tells how it was built, for infsa_kernels/info.py and for the check at import, and gives memory
// back.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "cpu/isa.h"
#include "cpu/pool.h"

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
