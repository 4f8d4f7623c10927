#include "cuda/check.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>

namespace crossvit::cuda {

Type type_of(at::ScalarType dtype) {
  if (dtype == at::kFloat) return Type::float32;
  if (dtype == at::kHalf) return Type::float16;
  TORCH_CHECK(dtype == at::kBFloat16, "the CUDA kernels take float32, float16 and bfloat16, not ", dtype);
  return Type::bfloat16;
}

Vector vector_of(const OptionalTensor& t) {
  if (!t) return {};
  TORCH_CHECK(t->is_contiguous(), "a parameter vector must be contiguous");
  return {t->const_data_ptr(), type_of(*t)};
}

Stream stream_of(const Tensor& t) {
  if (t.device().is_cpu()) return nullptr;
  return c10::impl::VirtualGuardImpl(t.device().type()).getStream(t.device()).native_handle();
}

void check(Error error, const char* kernel) {
  TORCH_CHECK(error == nullptr, "the CUDA kernel ", kernel, " was not launched: ", error);
}

bool allow_tf32() { return at::globalContext().allowTF32CuBLAS(); }

Tensor empty(at::IntArrayRef shape, at::ScalarType dtype, const Tensor& like) {
  return at::empty(shape, at::dtype(dtype).device(like.device()));
}

Tensor dense_rows(const Tensor& t) { return t.stride(-1) == 1 || t.size(-1) <= 1 ? t : t.contiguous(); }

bool aligned_to_16(const Tensor& t) {
  const auto divides = [&t](std::int64_t elements) { return elements * t.itemsize() % 16 == 0; };
  if (reinterpret_cast<std::uintptr_t>(t.const_data_ptr()) % 16 != 0 || t.stride(-1) != 1 || !divides(t.size(-1)))
    return false;
  for (std::int64_t d = 0; d + 1 < t.dim(); d++)
    if (t.size(d) > 1 && !divides(t.stride(d))) return false;
  return true;
}

RowTensor::RowTensor(const Tensor& t) : tensor(t), width(t.size(-1)), type(type_of(t)) {
  count = width ? t.numel() / width : 0;
  // Leading dimensions that lie one behind the other are one; two may remain.
  std::int64_t size[2] = {1, 1}, strides[2] = {0, 0};
  int found = 0;
  bool fits = width <= 1 || t.stride(-1) == 1;
  for (std::int64_t d = t.dim() - 2; d >= 0 && fits; d--) {
    if (t.size(d) == 1) continue;
    if (found && t.stride(d) == strides[found - 1] * size[found - 1]) {
      size[found - 1] *= t.size(d);
    } else if (found < 2) {
      size[found] = t.size(d);
      strides[found++] = t.stride(d);
    } else {
      fits = false;
    }
  }
  if (!fits) {
    tensor = t.contiguous();
    size[0] = std::max<std::int64_t>(count, 1);
    strides[0] = width;
    strides[1] = 0;
  }
  inner = size[0];
  stride = strides[0];
  outer_stride = strides[1];
  aligned = aligned_to_16(tensor);
}

Rows RowTensor::rows() const {
  Rows result;
  result.data = const_cast<void*>(tensor.const_data_ptr());
  result.type = type;
  result.aligned = aligned;
  result.row_stride = stride;
  if (inner < count) {
    TORCH_CHECK(count < std::int64_t{1} << 32, "a view of ", count, " rows with two strides; make it contiguous");
    result.tokens = static_cast<std::uint32_t>(inner);
    result.batch_stride = outer_stride;
  }
  return result;
}

}  // namespace crossvit::cuda
