#include "launch.h"

#include <cstdlib>
#include <new>

#include "torch_c/aten.h"

// Of the OpenMP library that PyTorch loaded, if it is built on one.
extern "C" __attribute__((weak)) int omp_in_parallel();

namespace crossvit {

namespace {

struct Scratch {
  char* data = nullptr;
  int64_t size = 0;
  ~Scratch() { std::free(data); }
};

}  // namespace

Taken taken() { return {kCPU, /*float16=*/false}; }

int64_t threads_here() {
  if (omp_in_parallel && omp_in_parallel()) return 1;
  uint32_t threads = 1;
  checked(torch_get_num_threads(&threads));
  return threads;
}

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

Rows rows_of(const RowTensor& t) { return {t.data, dtype_of(t.dtype), t.per_batch, t.batch_stride, t.row_stride}; }

void WeightTensor::view(const Tensor& t) {
  const bool dense = t.stride(1) == 1 || t.size(1) <= 1;
  if (!dense) owned = t.contiguous();
  const Tensor& rows = dense ? t : owned;
  matrix = {rows.const_data_ptr(), dtype_of(rows), rows.stride(0)};
}

ScalarType products_of(const Tensor& weight) {
  return active().dot_bf16 && weight.scalar_type() == kBFloat16 ? kBFloat16 : kFloat32;
}

WeightTensor transposed(const Tensor& weight) {
  Tensor result = empty({weight.size(1), weight.size(0)}, products_of(weight));
  const RowTensor from(weight);
  launch(active().transpose,
         TransposeArgs{rows_of(from), weight.size(0), weight.size(1), result.data_ptr(), dtype_of(result)});
  return WeightTensor(std::move(result));
}

ScaleTensor::ScaleTensor(const ScaleParams& params, const Tensor& x) {
  if (!params.values) return;
  tensor = params.values->contiguous();
  scale.kind = params.per_sample ? Scale::sample : Scale::channel;
  scale.values = vector_of(tensor);
  scale.rows_per_sample = std::max<int64_t>(1, x.numel() / std::max<int64_t>(1, x.size(0) * x.size(-1)));
}

Norm norm_of(const NormParams& norm, double eps, const Tensor& mean, const Tensor& rstd) {
  return {
      true, vector_of(norm.weight), vector_of(norm.bias), static_cast<float>(eps), float_data(mean), float_data(rstd)};
}

void NormGradients::append_to(std::vector<Tensor>& result, const NormParams& norm) const {
  if (weight.defined()) result.push_back(aten::sum(weight, {0}).to(norm.weight.scalar_type()));
  const Tensor& like = norm.bias ? *norm.bias : norm.weight;
  if (bias.defined()) result.push_back(aten::sum(bias, {0}).to(like.scalar_type()));
}

}  // namespace crossvit
