// Memory of the CPU kernels' callers: huge pages for what is big, working memory, and numbers of either precision.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/impl/alloc_cpu.h>

#include <cstring>

#include "../check.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace infsa::cpu {

// Asks for 2 MB pages before the first touch. The allocator maps every big piece anew, and faulting it in 4 KB at a
// time costs several times what writing it does (measured: 65 against 14 ms for 268 MB).
inline void use_huge_pages(void* fresh, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kBig = 4 << 20;
  if (bytes >= kBig) {
    const uintptr_t page = sysconf(_SC_PAGESIZE), data = reinterpret_cast<uintptr_t>(fresh);
    const uintptr_t begin = data / page * page;
    // Advice only: where it is refused, the pages stay small.
    madvise(reinterpret_cast<void*>(begin), data + bytes - begin, MADV_HUGEPAGE);
  }
#endif
}

inline Tensor with_huge_pages(Tensor fresh) {
  use_huge_pages(fresh.data_ptr(), fresh.nbytes());
  return fresh;
}

// A gradient of t, by default in its dtype; of no elements where it is not wanted.
inline Tensor new_gradient(bool wanted, const Tensor& t, bool zero = false, std::optional<at::ScalarType> dtype = {}) {
  const at::TensorOptions options = t.options().dtype(dtype.value_or(t.scalar_type()));
  const Tensor gradient = wanted ? with_huge_pages(at::empty_like(t, options)) : at::empty({0}, options);
  return zero ? gradient.zero_() : gradient;
}

// Working memory, aligned to cache lines. The kernels read whole vectors: kSlack bytes behind the end may be read too.
class Buffer {
 public:
  static constexpr int64_t kSlack = 64;

  explicit Buffer(int64_t bytes) : data_(static_cast<char*>(c10::alloc_cpu(bytes + kSlack))) {
    use_huge_pages(data_, bytes);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { c10::free_cpu(data_); }

  char* data() const { return data_; }
  template <typename T> T* as() const { return reinterpret_cast<T*>(data_); }

 private:
  char* data_;
};

// Numbers of the accumulation type, float32 or float64, read and written as float64.
class Numbers {
 public:
  explicit Numbers(const Tensor& t) : owner_(t), data_(t.data_ptr()), wide_(t.scalar_type() == at::kDouble) {}
  Numbers(const Buffer& buffer, bool wide) : data_(buffer.data()), wide_(wide) {}

  double operator[](int64_t i) const {
    return wide_ ? static_cast<const double*>(data_)[i] : static_cast<const float*>(data_)[i];
  }
  void set(int64_t i, double x) const {
    if (wide_)
      static_cast<double*>(data_)[i] = x;
    else
      static_cast<float*>(data_)[i] = static_cast<float>(x);
  }

 private:
  Tensor owner_;
  void* data_;
  bool wide_;
};

// rho head_rho of a head.
inline double rho_of(double rho, const OptTensor& head_rho, int64_t b, int64_t h) {
  return head_rho ? rho * Numbers(*head_rho)[b * head_rho->stride(0) + h * head_rho->stride(1)] : rho;
}

}  // namespace infsa::cpu
