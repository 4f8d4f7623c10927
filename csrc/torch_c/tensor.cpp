#include "torch_c/tensor.h"

#include <array>
#include <cstring>
#include <stdexcept>

// Of PyTorch 2.13 and newer.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace crossvit {

void failed() {
  const char* what =
      torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
  throw std::runtime_error(what && *what ? what : "PyTorch failed; what it said is on the standard error output");
}

// --- names --------------------------------------------------------------------------------------------------------------

namespace {

std::string look_up(std::initializer_list<std::pair<std::int32_t, const char*>> names, std::int32_t value,
                    const char* otherwise) {
  for (const auto& [number, name] : names)
    if (number == value) return name;
  return otherwise + std::to_string(value);
}

}  // namespace

std::string name_of(ScalarType dtype) {
  return look_up({{aoti_torch_dtype_float32(), "float32"},
                  {aoti_torch_dtype_float64(), "float64"},
                  {aoti_torch_dtype_float16(), "float16"},
                  {aoti_torch_dtype_bfloat16(), "bfloat16"},
                  {aoti_torch_dtype_bool(), "bool"},
                  {aoti_torch_dtype_uint8(), "uint8"},
                  {aoti_torch_dtype_int8(), "int8"},
                  {aoti_torch_dtype_int16(), "int16"},
                  {aoti_torch_dtype_int32(), "int32"},
                  {aoti_torch_dtype_int64(), "int64"},
                  {aoti_torch_dtype_complex64(), "complex64"},
                  {aoti_torch_dtype_complex128(), "complex128"}},
                 static_cast<std::int32_t>(dtype), "dtype ");
}

std::string name_of(DeviceType type) {
  return look_up({{aoti_torch_device_type_cpu(), "cpu"},
                  {aoti_torch_device_type_cuda(), "cuda"},
                  {aoti_torch_device_type_meta(), "meta"},
                  {aoti_torch_device_type_xpu(), "xpu"},
                  {aoti_torch_device_type_mps(), "mps"}},
                 static_cast<std::int32_t>(type), "device ");
}

std::string name_of(Device device) {
  return name_of(device.type) + (device.index < 0 ? "" : ":" + std::to_string(device.index));
}

// --- a tensor -----------------------------------------------------------------------------------------------------------

static const std::int32_t kStrided = aoti_torch_layout_strided();

Tensor::Tensor(AtenTensorHandle owned) : handle_(owned) {
  bool defined = false;
  aoti_torch_is_defined(handle_, &defined);
  if (!defined) {
    aoti_torch_delete_tensor_object(std::exchange(handle_, nullptr));
    return;
  }
  std::int32_t layout = 0, dtype = 0, type = 0, index = 0;
  aoti_torch_get_dtype(handle_, &dtype);
  aoti_torch_get_device_type(handle_, &type);
  aoti_torch_get_device_index(handle_, &index);
  aoti_torch_get_layout(handle_, &layout);
  read(ScalarType(dtype), {DeviceType(type), index}, layout == kStrided);
}

void Tensor::read(ScalarType dtype, Device device, bool dense) {
  facts_.dtype = dtype;
  facts_.device = device;
  std::int64_t *sizes = nullptr, *strides = nullptr;
  if (aoti_torch_get_sizes(handle_, &sizes) != AOTI_TORCH_SUCCESS) return;  // a nested tensor has none
  aoti_torch_get_dim(handle_, &facts_.dim);
  if (dense) aoti_torch_get_strides(handle_, &strides);
  facts_.sizes = sizes;
  facts_.strides = strides;
  facts_.numel = 1;
  for (const std::int64_t size : this->sizes()) facts_.numel *= size;
}

AtenTensorHandle Tensor::another_handle() const {
  AtenTensorHandle result = nullptr;
  if (handle_) checked(aoti_torch_new_tensor_handle(handle_, &result));
  return result;
}

bool Tensor::is_contiguous() const {
  if (!is_dense()) return false;
  std::int64_t expected = 1;
  for (std::int64_t d = facts_.dim - 1; d >= 0 && facts_.numel != 0; d--) {
    if (facts_.sizes[d] == 1) continue;
    if (facts_.strides[d] != expected) return false;
    expected *= facts_.sizes[d];
  }
  return true;
}

std::int64_t Tensor::storage_offset() const {
  std::int64_t result = 0;
  checked(aoti_torch_get_storage_offset(handle_, &result));
  return result;
}

std::int64_t Tensor::storage_bytes() const {
  std::int64_t result = 0;
  checked(aoti_torch_get_storage_size(handle_, &result));
  return result;
}

const void* Tensor::data() const {
  const void* result = nullptr;
  checked(torch_get_const_data_ptr(handle_, &result));
  return result;
}

Tensor Tensor::copy(ScalarType dtype) const {
  Tensor result = empty(sizes(), dtype, device());
  checked(aoti_torch_copy_(result.handle_, handle_, /*non_blocking=*/0));
  return result;
}

Tensor Tensor::contiguous() const { return is_contiguous() ? *this : copy(facts_.dtype); }

Tensor Tensor::to(ScalarType dtype) const { return dtype == facts_.dtype ? *this : copy(dtype); }

Tensor Tensor::strided(Sizes sizes, Sizes strides, std::int64_t first) const {
  AtenTensorHandle result = nullptr;
  checked(aoti_torch__reinterpret_tensor(handle_, static_cast<std::int64_t>(sizes.size()), sizes.begin(),
                                         strides.begin(), first, &result));
  return {result, facts_.dtype, facts_.device};
}

namespace {

// The strides of a contiguous tensor.
class ContiguousStrides {
 public:
  explicit ContiguousStrides(Sizes sizes) {
    if (sizes.size() > few_.size()) many_.resize(sizes.size());
    std::int64_t* strides = data();
    std::int64_t stride = 1;
    for (std::size_t d = sizes.size(); d-- > 0;) {
      strides[d] = stride;
      stride *= sizes[d] > 1 ? sizes[d] : 1;
    }
  }
  std::int64_t* data() { return many_.empty() ? few_.data() : many_.data(); }

 private:
  std::array<std::int64_t, 8> few_;
  std::vector<std::int64_t> many_;
};

}  // namespace

Tensor Tensor::view(Sizes sizes) const {
  std::vector<std::int64_t> shape = sizes.vec();
  std::int64_t known = 1;
  for (const std::int64_t size : shape)
    if (size >= 0) known *= size;
  for (std::int64_t& size : shape)
    if (size < 0) size = known ? facts_.numel / known : 0;
  return strided(shape, {ContiguousStrides(shape).data(), shape.size()});
}

Tensor Tensor::narrow(std::int64_t dim, std::int64_t start, std::int64_t length) const {
  std::vector<std::int64_t> shape = sizes().vec();
  shape[dim] = length;
  return strided(shape, strides(), start * stride(dim));
}

Tensor Tensor::permute(Sizes order) const {
  std::vector<std::int64_t> shape, steps;
  for (const std::int64_t d : order) {
    shape.push_back(size(d));
    steps.push_back(stride(d));
  }
  return strided(shape, steps);
}

// --- memory -------------------------------------------------------------------------------------------------------------

static bool nan_in_empty = false;

// What keeps a new tensor from being made is nearly always memory, which Python raises as an error of its own kind
// (crossvit_kernels/dispatch/native.py); the C interface does not say which kind an error was.
[[noreturn, gnu::cold, gnu::noinline]] static void not_allocated(Device device) {
  try {
    failed();
  } catch (const std::runtime_error& error) {
    if (device.type != kCUDA || std::string(error.what()).find("out of memory") != std::string::npos) throw;
    throw std::runtime_error(name_of(device) + " is out of memory: " + error.what());
  }
}

void fill_empty_with_nan(bool fill) { nan_in_empty = fill; }

Tensor empty(Sizes sizes, ScalarType dtype, Device device) {
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()), sizes.begin(), ContiguousStrides(sizes).data(),
                               static_cast<std::int32_t>(dtype), static_cast<std::int32_t>(device.type), device.index,
                               &handle))
    not_allocated(device);
  Tensor result(handle, dtype, device);
  if (nan_in_empty && device.type == kCPU && result.numel())  // all bits set are a NaN in every floating-point type
    std::memset(result.data_ptr(), 0xff, static_cast<std::size_t>(result.numel() * result.itemsize()));
  return result;
}

Tensor zeros(Sizes sizes, ScalarType dtype, Device device) {
  Tensor result = empty(sizes, dtype, device);
  checked(aoti_torch_zero_(result.handle()));
  return result;
}

}  // namespace crossvit
