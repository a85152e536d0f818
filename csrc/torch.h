// All that csrc knows of torch: its stable C interface, so that one compiled library serves every torch from 2.10 on.
// Tensors, how new ones are made, and how a function becomes a kernel of an operator.
//
// What is thrown crosses that interface as ValueError (std::invalid_argument), MemoryError (std::bad_alloc) or
// RuntimeError. A TypeError cannot: Python says in words what was refused (infsa_kernels/ops/check.py).
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

// In torch since 2.13; null where it is missing.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace infsa {

using IntArrayRef = torch::headeronly::IntHeaderOnlyArrayRef;

// Torch's own name of a dtype.
enum class Dtype : int32_t {};
inline const Dtype kFloat{aoti_torch_dtype_float32()}, kDouble{aoti_torch_dtype_float64()},
    kBFloat16{aoti_torch_dtype_bfloat16()}, kHalf{aoti_torch_dtype_float16()}, kBool{aoti_torch_dtype_bool()},
    kInt{aoti_torch_dtype_int32()}, kLong{aoti_torch_dtype_int64()};

struct Device {
  int32_t type, index;

  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};
inline const Device kCPU{aoti_torch_device_type_cpu(), -1};

inline void succeed(AOTITorchError code, const char* what) {
  if (code == AOTI_TORCH_SUCCESS) return;
  const char* reason = torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : "";
  throw std::runtime_error(std::string("infsa_kernels: torch failed to ") + what + ": " + reason);
}

// A handle of a tensor. A copy of it costs an allocation: kernels take references.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle owned) : handle_(owned) {}
  Tensor(const Tensor& other) {
    if (other.handle_) succeed(aoti_torch_new_tensor_handle(other.handle_, &handle_), "share a tensor");
  }
  Tensor(Tensor&& other) noexcept : handle_(other.release()) {}
  Tensor& operator=(Tensor other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  bool defined() const { return handle_; }

  int64_t dim() const { return ask<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return ask<int64_t>(aoti_torch_get_numel); }
  IntArrayRef sizes() const { return {ask<int64_t*>(aoti_torch_get_sizes), static_cast<size_t>(dim())}; }
  IntArrayRef strides() const { return {ask<int64_t*>(aoti_torch_get_strides), static_cast<size_t>(dim())}; }
  int64_t size(int64_t dim) const { return ask_of(dim, aoti_torch_get_size); }
  int64_t stride(int64_t dim) const { return ask_of(dim, aoti_torch_get_stride); }
  int64_t storage_offset() const { return ask<int64_t>(aoti_torch_get_storage_offset); }
  int64_t storage_bytes() const { return ask<int64_t>(aoti_torch_get_storage_size); }
  bool is_contiguous() const { return ask<bool>(aoti_torch_is_contiguous); }
  bool is_strided() const { return ask<int32_t>(aoti_torch_get_layout) == aoti_torch_layout_strided(); }
  Dtype dtype() const { return Dtype{ask<int32_t>(aoti_torch_get_dtype)}; }
  int64_t element_size() const { return aoti_torch_dtype_element_size(ask<int32_t>(aoti_torch_get_dtype)); }
  Device device() const {
    return {ask<int32_t>(aoti_torch_get_device_type), ask<int32_t>(aoti_torch_get_device_index)};
  }
  void* data_ptr() const { return ask<void*>(aoti_torch_get_data_ptr); }
  template <typename T> T* data_ptr() const { return static_cast<T*>(data_ptr()); }
  template <typename T> const T* const_data_ptr() const {
    return static_cast<const T*>(ask<const void*>(torch_get_const_data_ptr));
  }

 private:
  template <typename T> T ask(AOTITorchError (*question)(AtenTensorHandle, T*)) const {
    if (!handle_) throw std::logic_error("infsa_kernels: a tensor that is none was asked");
    T answer;
    succeed(question(handle_, &answer), "describe a tensor");
    return answer;
  }
  int64_t ask_of(int64_t dim, AOTITorchError (*question)(AtenTensorHandle, int64_t, int64_t*)) const {
    int64_t answer;
    succeed(question(handle_, dim, &answer), "describe a tensor");
    return answer;
  }

  AtenTensorHandle handle_ = nullptr;
};

using OptTensor = std::optional<Tensor>;

// Uninitialised; NaN where torch is asked to fill such tensors.
inline Tensor empty_strided(IntArrayRef sizes, IntArrayRef strides, Dtype dtype, Device device = kCPU) {
  AtenTensorHandle made;
  succeed(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), static_cast<int32_t>(dtype), device.type,
                                   device.index, &made),
          "make a tensor");
  return Tensor(made);
}

inline std::vector<int64_t> contiguous_strides(IntArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i] > 1 ? sizes[i] : 1) strides[i] = stride;
  return strides;
}

inline Tensor empty(IntArrayRef sizes, Dtype dtype, Device device = kCPU) {
  return empty_strided(sizes, contiguous_strides(sizes), dtype, device);
}

inline const Tensor& fill(const Tensor& t, double x) {
  succeed(aoti_torch_aten_fill__Scalar(t.get(), x), "fill a tensor");
  return t;
}

inline const Tensor& zero(const Tensor& t) {
  succeed(aoti_torch_zero_(t.get()), "fill a tensor");
  return t;
}

inline Tensor zeros(IntArrayRef sizes, Dtype dtype) { return zero(empty(sizes, dtype)); }

inline const Tensor& copy(const Tensor& to, const Tensor& from) {
  succeed(aoti_torch_copy_(to.get(), from.get(), 0), "copy a tensor");
  return to;
}

// Of a dtype, and contiguous; t itself if it is that.
inline Tensor contiguous(const Tensor& t, Dtype dtype) {
  if (t.dtype() == dtype && t.is_contiguous()) return t;
  return copy(empty(t.sizes(), dtype, t.device()), t);
}
inline Tensor contiguous(const Tensor& t) { return contiguous(t, t.dtype()); }

// A view from t's first element on. Nothing checks that it stays in t's memory.
inline Tensor as_strided(const Tensor& t, IntArrayRef sizes, IntArrayRef strides) {
  AtenTensorHandle view;
  succeed(aoti_torch__reinterpret_tensor(t.get(), sizes.size(), sizes.data(), strides.data(), 0, &view),
          "view a tensor");
  return Tensor(view);
}

template <typename T> struct Argument {
  static T take(StableIValue value) { return torch::stable::detail::to<T>(value); }
};
template <> struct Argument<Tensor> {
  static Tensor take(StableIValue value) { return Tensor(torch::stable::detail::to<AtenTensorHandle>(value)); }
};
template <> struct Argument<OptTensor> {
  static OptTensor take(StableIValue value) {
    const auto handle = torch::stable::detail::to<std::optional<AtenTensorHandle>>(value);
    return handle ? OptTensor(Tensor(*handle)) : std::nullopt;
  }
};
template <size_t n> struct Argument<std::array<bool, n>> {
  static std::array<bool, n> take(StableIValue value) {
    const auto list = torch::stable::detail::to<std::vector<bool>>(value);
    if (list.size() != n) throw std::invalid_argument("infsa: output_mask's length");
    std::array<bool, n> all;
    std::copy(list.begin(), list.end(), all.begin());
    return all;
  }
};

inline void put(StableIValue* results, Tensor& t) { results[0] = torch::stable::detail::from(t.release()); }
template <typename... T> void put(StableIValue* results, std::tuple<T...>& all) {
  std::apply([&](auto&... t) { (put(results++, t), ...); }, all);
}

template <typename Result, typename... Arguments, size_t... i>
void call(Result (*function)(Arguments...), StableIValue* stack, std::index_sequence<i...>) {
  // In braces, in their order: each takes the handle that the caller has given away.
  const std::tuple<std::decay_t<Arguments>...> arguments{Argument<std::decay_t<Arguments>>::take(stack[i])...};
  Result results = std::apply(function, arguments);
  put(stack, results);
}

template <typename Result, typename... Arguments>
void call(Result (*function)(Arguments...), StableIValue* stack, uint64_t given) {
  if (given != sizeof...(Arguments)) throw std::invalid_argument("infsa: another schema than the library's");
  call(function, stack, std::index_sequence_for<Arguments...>());
}

// A function as INFSA_LIBRARY_IMPL takes it: m.impl("linear_fwd", kernel<linear_fwd>); or a lambda that captures
// nothing, by kernel([](...) { ... }).
template <auto function> void kernel(StableIValue* stack, uint64_t arguments, uint64_t) {
  call(function, stack, arguments);
}
template <typename Lambda> auto kernel(const Lambda& lambda) {
  static_assert(std::is_class_v<Lambda>);
  static const Lambda own = lambda;  // each has a type of its own
  return +[](StableIValue* stack, uint64_t arguments, uint64_t) { call(+own, stack, arguments); };
}

// What infsa_register of library.h will do.
struct Registration {
  const char* key;
  void (*function)(torch::stable::detail::StableLibrary&);
  const char* file;
  uint32_t line;
};
bool register_later(const Registration& registration);

}  // namespace infsa

// STABLE_TORCH_LIBRARY_IMPL for namespaces that are named later; once in a file.
#define INFSA_LIBRARY_IMPL(KEY, m)                                          \
  static void register_kernels(torch::stable::detail::StableLibrary&);      \
  [[maybe_unused]] static const bool kernels_are_known =                    \
      infsa::register_later({#KEY, &register_kernels, __FILE__, __LINE__}); \
  static void register_kernels(torch::stable::detail::StableLibrary& m)
