#include "launch.h"

#include <ATen/ops/empty.h>

#include <cstdlib>
#include <new>

namespace crossvit {

namespace {

struct Scratch {
  char* data = nullptr;
  int64_t size = 0;
  ~Scratch() { std::free(data); }
};

}  // namespace

char* thread_scratch(int64_t bytes) {
  thread_local Scratch scratch;
  if (scratch.size < bytes) {
    std::free(scratch.data);
    scratch.size = (bytes + 4095) / 4096 * 4096;
    scratch.data = static_cast<char*>(std::aligned_alloc(64, scratch.size));
    if (!scratch.data) {
      scratch.size = 0;
      throw std::bad_alloc();
    }
  }
  return scratch.data;
}

Rows rows_of(const RowTensor& t) {
  return {const_cast<void*>(t.tensor.const_data_ptr()), dtype_of(t.tensor), t.per_batch, t.batch_stride, t.row_stride};
}

WeightTensor::WeightTensor(const Tensor& t) : tensor(t.stride(1) == 1 || t.size(1) <= 1 ? t : t.contiguous()) {
  matrix = {tensor.const_data_ptr(), dtype_of(tensor), tensor.stride(0)};
}

at::ScalarType products_of(const Tensor& weight) {
  return active().dot_bf16 && weight.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
}

WeightTensor transposed(const Tensor& weight) {
  const Tensor result = empty({weight.size(1), weight.size(0)}, products_of(weight));
  const RowTensor from(weight);
  TransposeArgs args{rows_of(from), weight.size(0), weight.size(1), result.data_ptr(), dtype_of(result)};
  launch(active().transpose, args);
  return WeightTensor(result);
}

ScaleTensor::ScaleTensor(const OptionalTensor& t, bool per_sample, const Tensor& x) {
  if (!t) return;
  tensor = t->contiguous();
  scale.kind = per_sample ? Scale::sample : Scale::channel;
  scale.values = vector_of(tensor);
  scale.rows_per_sample = std::max<int64_t>(1, x.numel() / std::max<int64_t>(1, x.size(0) * x.size(-1)));
}

Norm norm_of(const Tensor& weight, const OptionalTensor& bias, double eps) {
  Norm norm;
  norm.present = true;
  norm.weight = vector_of(weight);
  norm.bias = vector_of(bias);
  norm.eps = static_cast<float>(eps);
  return norm;
}

NormGradients::NormGradients(bool weight_wanted, bool bias_wanted, int64_t tasks, int64_t width, const Tensor& like) {
  const auto options = like.options().dtype(at::kFloat);
  if (weight_wanted) weight = at::empty({tasks, width}, options);
  if (bias_wanted) bias = at::empty({tasks, width}, options);
}

Tensor total(const Tensor& partial, const Tensor& parameter) { return partial.sum(0).to(parameter.scalar_type()); }

}  // namespace crossvit
