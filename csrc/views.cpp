#include "views.h"

#include <algorithm>

namespace crossvit {

DType dtype_of(ScalarType dtype) {
  if (dtype == kFloat32) return DType::float32;
  if (dtype == kBFloat16) return DType::bfloat16;
  require(dtype == kFloat16, "the kernels take float32, float16 and bfloat16, not ", name_of(dtype));
  return DType::float16;
}

Vector vector_of(const Tensor& t) {
  require(t.is_contiguous(), "a parameter vector must be contiguous");
  return {t.const_data_ptr(), dtype_of(t)};
}

Tensor dense_rows(const Tensor& t) { return t.stride(-1) == 1 || t.size(-1) <= 1 ? t : t.contiguous(); }

void RowTensor::view(const Tensor& t) {
  width = t.size(-1);
  count = width ? t.numel() / width : 0;
  // Leading dimensions that lie one behind the other are one; two may remain.
  std::int64_t size[2] = {1, 1}, stride[2] = {0, 0};
  int found = 0;
  bool fits = width <= 1 || t.stride(-1) == 1;
  for (std::int64_t d = t.dim() - 2; d >= 0 && fits; d--) {
    if (t.size(d) == 1) continue;
    if (found && t.stride(d) == stride[found - 1] * size[found - 1]) {
      size[found - 1] *= t.size(d);
    } else if (found < 2) {
      size[found] = t.size(d);
      stride[found++] = t.stride(d);
    } else {
      fits = false;
    }
  }
  if (!fits) {
    owned = t.contiguous();
    size[0] = std::max<std::int64_t>(count, 1);
    stride[0] = width;
    stride[1] = 0;
  }
  data = fits ? t.data_ptr() : owned.data_ptr();
  dtype = t.scalar_type();
  per_batch = size[0];
  row_stride = stride[0];
  batch_stride = stride[1];
}

}  // namespace crossvit
