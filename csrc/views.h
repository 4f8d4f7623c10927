// Tensors as the plain views that kernels take, the same on the CPU and on CUDA.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "plain.h"

namespace crossvit {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// float32, float16 or bfloat16; others do not get here (arguments.h).
DType dtype_of(at::ScalarType dtype);
inline DType dtype_of(const Tensor& t) { return dtype_of(t.scalar_type()); }

// A contiguous parameter vector, or one without data where there is none.
Vector vector_of(const OptionalTensor& t);

// A matrix (or a tensor of rows) whose last stride is 1; a copy where it was not.
Tensor dense_rows(const Tensor& t);

// A tensor (..., width) as `count` rows of adjacent elements: row i begins at
//     i / per_batch * batch_stride + i % per_batch * row_stride
// in elements. The tensor itself where two strides say where its rows lie, else a contiguous copy that this owns.
struct RowTensor {
  Tensor tensor;
  std::int64_t count = 0, width = 0, per_batch = 1, batch_stride = 0, row_stride = 0;

  RowTensor() = default;
  explicit RowTensor(const Tensor& t);
};

// Memory that is not initialized.
Tensor empty(at::IntArrayRef shape, at::ScalarType dtype, c10::Device device);
inline Tensor empty(at::IntArrayRef shape, at::ScalarType dtype, const Tensor& like) {
  return empty(shape, dtype, like.device());
}
inline Tensor empty_f32(at::IntArrayRef shape, const Tensor& like) { return empty(shape, at::kFloat, like); }

// A tensor's elements, or null where it has none.
inline float* float_data(const Tensor& t) { return t.numel() ? t.mutable_data_ptr<float>() : nullptr; }

}  // namespace crossvit
