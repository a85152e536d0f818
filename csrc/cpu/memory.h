// Memory of the CPU kernels' callers: results, working memory, and numbers of either precision.
#pragma once

#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#include "../check.h"
#include "../strides.h"
#include "pool.h"

// In torch since 2.11. Where it is missing, torch's own memory does, and nothing of it is kept.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* made, int32_t layout, const uint8_t* metadata,
    int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace infsa::cpu {

// Whether torch is asked to fill uninitialised memory, which one number tells.
inline bool fills_memory() {
  const Tensor number = empty({1}, kDouble);
  return !(*number.const_data_ptr<double>() == *number.const_data_ptr<double>());
}

// A big uninitialised tensor, in memory that the pool gets back with its last view.
inline Tensor pooled_tensor(IntArrayRef sizes, IntArrayRef strides, Dtype dtype, int64_t bytes) {
  auto piece = std::make_unique<Piece>(take_memory(bytes));
  const auto give_back = [](void*, void* context) {
    const std::unique_ptr<Piece> piece(static_cast<Piece*>(context));
    give_memory(*piece);
  };
  AtenTensorHandle made;
  const AOTITorchError code =
      torch_from_blob(piece->data, sizes.size(), sizes.data(), strides.data(), 0, static_cast<int32_t>(dtype),
                      kCPU.type, kCPU.index, &made, aoti_torch_layout_strided(), nullptr, 0, give_back, piece.get());
  if (code != AOTI_TORCH_SUCCESS) give_memory(*piece);
  succeed(code, "make a tensor");
  piece.release();
  const Tensor t(made);
  return fills_memory() ? fill(t, std::numeric_limits<double>::quiet_NaN()) : t;
}

// An uninitialised tensor; NaN where torch is asked to fill those.
inline Tensor new_tensor(IntArrayRef sizes, IntArrayRef strides, Dtype dtype) {
  int64_t bytes = aoti_torch_dtype_element_size(static_cast<int32_t>(dtype));
  for (const int64_t size : sizes) bytes *= size;
  return bytes >= int64_t(kBig) && torch_from_blob ? pooled_tensor(sizes, strides, dtype, bytes)
                                                   : empty_strided(sizes, strides, dtype);
}

// A gradient of t, by default in its dtype; of no elements where it is not wanted.
inline Tensor new_gradient(bool wanted, const Tensor& t, bool zero_it = false, std::optional<Dtype> dtype = {}) {
  const Dtype of = dtype.value_or(t.dtype());
  if (!wanted) return empty({0}, of);
  Tensor gradient = new_tensor(t.sizes(), dense_strides(t.sizes(), t.strides()), of);
  if (zero_it) zero(gradient);
  return gradient;
}

// Working memory, aligned to cache lines. The kernels read whole vectors: kSlack bytes behind the end may be read too.
class Buffer {
 public:
  static constexpr int64_t kSlack = 64;

  explicit Buffer(int64_t bytes) : pooled_(bytes + kSlack >= int64_t(kBig)) {
    const int64_t whole = round_up(bytes + kSlack, kSlack);
    piece_ = pooled_ ? take_memory(whole) : Piece{std::aligned_alloc(kSlack, whole), 0};
    if (!piece_.data) throw std::bad_alloc();
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { pooled_ ? give_memory(piece_) : std::free(piece_.data); }

  char* data() const { return static_cast<char*>(piece_.data); }
  template <typename T> T* as() const { return static_cast<T*>(piece_.data); }

 private:
  const bool pooled_;
  Piece piece_;
};

// Numbers of the accumulation type A, read and written as float64: those of a tensor that outlives them, or that is
// theirs.
template <typename A> class NumbersOf {
 public:
  explicit NumbersOf(const Tensor& t) : data_(t.defined() ? static_cast<A*>(t.data_ptr()) : nullptr) {}
  explicit NumbersOf(Tensor&& t) : NumbersOf(static_cast<const Tensor&>(t)) { owner_ = std::move(t); }
  explicit NumbersOf(const Buffer& buffer) : data_(buffer.as<A>()) {}

  double operator[](int64_t i) const { return data_[i]; }
  void set(int64_t i, double x) const { data_[i] = static_cast<A>(x); }
  A* from(int64_t i) const { return data_ + i; }

 private:
  Tensor owner_;
  A* data_;
};

// The same of either type, float32 or float64, which each access looks up.
class Numbers {
 public:
  explicit Numbers(const Tensor& t)
      : data_(t.defined() ? t.data_ptr() : nullptr), wide_(t.defined() && t.dtype() == kDouble) {}
  explicit Numbers(Tensor&& t) : Numbers(static_cast<const Tensor&>(t)) { owner_ = std::move(t); }
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
