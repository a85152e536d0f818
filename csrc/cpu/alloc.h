// Huge pages for big new tensors.
#pragma once

#include <ATen/core/Tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace infsa::cpu {

// Asks for 2 MB pages before the first touch of `fresh`, which is returned. The allocator maps every big tensor anew,
// and faulting it in 4 KB at a time costs several times what writing it does (measured: 65 against 14 ms for 268 MB).
inline at::Tensor with_huge_pages(at::Tensor fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kBig = 4 << 20;
  if (fresh.nbytes() >= kBig) {
    const uintptr_t page = sysconf(_SC_PAGESIZE), data = reinterpret_cast<uintptr_t>(fresh.data_ptr());
    const uintptr_t begin = data / page * page;
    // Advice only: where it is refused, the pages stay small.
    madvise(reinterpret_cast<void*>(begin), data + fresh.nbytes() - begin, MADV_HUGEPAGE);
  }
#endif
  return fresh;
}

}  // namespace infsa::cpu
