// Tensors as the plain views that kernels take, the same on the CPU and on CUDA.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "plain.h"
#include "torch_c/tensor.h"

namespace crossvit {

// Throws where this does not hold, with these words and numbers.
template <class... Words>
void require(bool holds, const Words&... words) {
  if (holds) [[likely]]
    return;
  std::string text;
  const auto say = [&text](const auto& word) {
    if constexpr (std::is_arithmetic_v<std::remove_cvref_t<decltype(word)>>) {
      text += std::to_string(word);
    } else {
      text += word;
    }
  };
  (say(words), ...);
  throw std::runtime_error(text);
}

// float32, float16 or bfloat16; others do not get here (arguments.h).
DType dtype_of(ScalarType dtype);
inline DType dtype_of(const Tensor& t) { return dtype_of(t.scalar_type()); }

// A contiguous parameter vector, or one without data where there is none.
Vector vector_of(const Tensor& t);
inline Vector vector_of(const OptionalTensor& t) { return t ? vector_of(*t) : Vector{}; }

// A matrix (or a tensor of rows) whose last stride is 1; a copy where it was not.
Tensor dense_rows(const Tensor& t);

// A tensor (..., width) as `count` rows of adjacent elements: row i begins at
//     i / per_batch * batch_stride + i % per_batch * row_stride
// in elements. The tensor's own memory where two strides say where its rows lie, else that of a contiguous copy. A tensor that is
// not handed over for good has to outlive this.
struct RowTensor {
  Tensor owned;
  void* data = nullptr;
  ScalarType dtype{};
  std::int64_t count = 0, width = 0, per_batch = 1, batch_stride = 0, row_stride = 0;

  RowTensor() = default;
  explicit RowTensor(const Tensor& t) { view(t); }
  explicit RowTensor(Tensor&& t) : owned(std::move(t)) { view(owned); }
  explicit RowTensor(const Tensor&& t) : owned(t) { view(owned); }

 private:
  void view(const Tensor& t);
};

inline Tensor empty(Sizes shape, ScalarType dtype, const Tensor& like) { return empty(shape, dtype, like.device()); }
inline Tensor empty_f32(Sizes shape, const Tensor& like) { return empty(shape, kFloat32, like); }

// A tensor's elements, or null where it has none or is not defined.
inline float* float_data(const Tensor& t) { return t.numel() ? t.data_ptr<float>() : nullptr; }
inline void* data_of(const Tensor& t) { return t.numel() ? t.data_ptr() : nullptr; }

}  // namespace crossvit
