// A tensor of PyTorch, by way of PyTorch's stable C interface alone: a library that is built on it once serves every PyTorch from 2.11
// on. What the code asks of a tensor again and again (sizes, strides, dtype) is read once, when the tensor arrives.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace crossvit {

// Throws where a function of the C interface reports that it failed, with PyTorch's own words where this PyTorch hands them out.
[[noreturn, gnu::cold, gnu::noinline]] void failed();
inline void checked(AOTITorchError error) {
  if (error != AOTI_TORCH_SUCCESS) [[unlikely]]
    failed();
}

// An element type and a type of device, by the numbers that PyTorch gives them when the library is loaded.
enum class ScalarType : std::int32_t {};
inline const ScalarType kFloat32{aoti_torch_dtype_float32()}, kFloat64{aoti_torch_dtype_float64()};
inline const ScalarType kFloat16{aoti_torch_dtype_float16()}, kBFloat16{aoti_torch_dtype_bfloat16()};
std::string name_of(ScalarType dtype);

enum class DeviceType : std::int32_t {};
inline const DeviceType kCPU{aoti_torch_device_type_cpu()}, kCUDA{aoti_torch_device_type_cuda()};
std::string name_of(DeviceType type);

struct Device {
  DeviceType type{};
  std::int32_t index = 0;
  bool operator==(const Device&) const = default;
};
std::string name_of(Device device);

// Sizes or strides that lie elsewhere, for as long as a call lasts.
class Sizes {
 public:
  Sizes(const std::int64_t* data, std::size_t size) : data_(data), size_(size) {}
  Sizes(std::initializer_list<std::int64_t> values) : Sizes(values.begin(), values.size()) {}
  Sizes(const std::vector<std::int64_t>& values) : Sizes(values.data(), values.size()) {}

  const std::int64_t* begin() const { return data_; }
  const std::int64_t* end() const { return data_ + size_; }
  std::size_t size() const { return size_; }
  std::int64_t operator[](std::size_t i) const { return data_[i]; }
  std::int64_t back() const { return data_[size_ - 1]; }
  std::vector<std::int64_t> vec() const { return {begin(), end()}; }

 private:
  const std::int64_t* data_;
  std::size_t size_;
};

// A tensor, which this holds on to; or none. Only a dense tensor has strides and memory.
class Tensor {
 public:
  Tensor() = default;
  // Takes over a handle. That of an undefined tensor, which Python's None is handed over as, makes none.
  explicit Tensor(AtenTensorHandle owned);
  // Takes over the handle of a dense tensor, of which the caller knows this much.
  Tensor(AtenTensorHandle owned, ScalarType dtype, Device device) : handle_(owned) { read(dtype, device, true); }
  Tensor(const Tensor& other) : facts_(other.facts_), handle_(other.another_handle()) {}
  Tensor(Tensor&& other) noexcept : facts_(other.facts_), handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor other) noexcept {
    std::swap(facts_, other.facts_);
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  bool defined() const { return handle_ != nullptr; }
  bool is_dense() const { return facts_.strides != nullptr; }
  std::int64_t dim() const { return facts_.dim; }
  std::int64_t numel() const { return facts_.numel; }
  Sizes sizes() const { return {facts_.sizes, static_cast<std::size_t>(facts_.dim)}; }
  Sizes strides() const { return {facts_.strides, is_dense() ? static_cast<std::size_t>(facts_.dim) : 0}; }
  // Of a dimension that there is; a negative one counts from the last.
  std::int64_t size(std::int64_t d) const { return facts_.sizes[d < 0 ? d + facts_.dim : d]; }
  std::int64_t stride(std::int64_t d) const { return facts_.strides[d < 0 ? d + facts_.dim : d]; }
  ScalarType scalar_type() const { return facts_.dtype; }
  std::int64_t itemsize() const { return static_cast<std::int64_t>(aoti_torch_dtype_element_size(int(facts_.dtype))); }
  Device device() const { return facts_.device; }
  bool is_contiguous() const;
  // Where it begins in its memory, in elements, and how many bytes that memory has.
  std::int64_t storage_offset() const;
  std::int64_t storage_bytes() const;

  template <class T = void>
  const T* const_data_ptr() const {
    return static_cast<const T*>(data());
  }
  template <class T = void>
  T* data_ptr() const {  // of a tensor that this library made, or of one whose elements are only read
    return static_cast<T*>(const_cast<void*>(data()));
  }

  // Itself where it is already so, else a copy.
  Tensor contiguous() const;
  Tensor to(ScalarType dtype) const;
  // The same memory: with other sizes and strides, from an element on; with other sizes of a contiguous tensor, one of which may be
  // -1; a range of a dimension; the dimensions in another order.
  Tensor strided(Sizes sizes, Sizes strides, std::int64_t first = 0) const;
  Tensor view(Sizes sizes) const;
  Tensor narrow(std::int64_t dim, std::int64_t start, std::int64_t length) const;
  Tensor permute(Sizes order) const;

  AtenTensorHandle handle() const { return handle_; }
  AtenTensorHandle release() && { return std::exchange(handle_, nullptr); }

 private:
  const void* data() const;
  AtenTensorHandle another_handle() const;
  void read(ScalarType dtype, Device device, bool dense);
  Tensor copy(ScalarType dtype) const;

  struct Facts {
    const std::int64_t *sizes = nullptr, *strides = nullptr;  // the tensor's own
    std::int64_t dim = 0, numel = 0;
    ScalarType dtype{};
    Device device;
  };
  Facts facts_;
  AtenTensorHandle handle_ = nullptr;
};

using OptionalTensor = std::optional<Tensor>;

// Contiguous memory that is not initialized; on the CPU it holds NaN instead where tests asked for it.
Tensor empty(Sizes sizes, ScalarType dtype, Device device);
Tensor zeros(Sizes sizes, ScalarType dtype, Device device);
void fill_empty_with_nan(bool fill);

// The dtype of a sum of these two of float32, float16 and bfloat16.
inline ScalarType promoted(ScalarType a, ScalarType b) { return a == b ? a : kFloat32; }

}  // namespace crossvit
