// Memory of the CPU kernels' callers: results, working memory, and numbers of either precision.
#pragma once

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <c10/core/impl/alloc_cpu.h>

#include <limits>

#include "../check.h"
#include "pool.h"

namespace infsa::cpu {

// An uninitialised tensor; NaN where torch is asked to fill those, as at::empty does.
inline Tensor new_tensor(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype) {
  const Tensor t = at::detail::empty_strided_generic(sizes, strides, &pooled_allocator(),
                                                     c10::DispatchKeySet(c10::DispatchKey::CPU), dtype);
  const auto& context = at::globalContext();
  const bool fill = context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
  return fill ? t.fill_(std::numeric_limits<double>::quiet_NaN()) : t;
}

// A gradient of t, by default in its dtype; of no elements where it is not wanted.
inline Tensor new_gradient(bool wanted, const Tensor& t, bool zero = false, std::optional<at::ScalarType> dtype = {}) {
  const at::ScalarType of = dtype.value_or(t.scalar_type());
  if (!wanted) return at::detail::empty_cpu({0}, of);
  const bool dense = t.is_non_overlapping_and_dense();
  const Tensor gradient =
      new_tensor(t.sizes(), dense ? t.strides() : at::infer_dense_strides(t.sizes(), t.strides()), of);
  return zero ? gradient.zero_() : gradient;
}

// Working memory, aligned to cache lines. The kernels read whole vectors: kSlack bytes behind the end may be read too.
class Buffer {
 public:
  static constexpr int64_t kSlack = 64;

  explicit Buffer(int64_t bytes) : pooled_(bytes + kSlack >= int64_t(kBig)) {
    piece_ = pooled_ ? take_memory(bytes + kSlack) : Piece{c10::alloc_cpu(bytes + kSlack), 0};
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { pooled_ ? give_memory(piece_) : c10::free_cpu(piece_.data); }

  char* data() const { return static_cast<char*>(piece_.data); }
  template <typename T> T* as() const { return static_cast<T*>(piece_.data); }

 private:
  const bool pooled_;
  Piece piece_;
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
