// Torch tensors in, kernels run: the views that kernels.h wants of a tensor, and the loop over a kernel's tasks.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "arguments.h"
#include "kernels.h"

namespace crossvit {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The tensors that the kernels take.
inline constexpr Taken kTaken{c10::DeviceType::CPU, /*float16=*/false};

// The kernels of the instruction set in force (bindings.cpp chooses it when the module is loaded).
const Kernels& active();

// Memory of this thread, at least `bytes` long and aligned to a cache line; kept from call to call.
char* thread_scratch(int64_t bytes);

inline int64_t threads_here() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// Runs the tasks of one or more calls of a kernel on torch's threads. They are handed out one by one, since neither the tasks
// nor, on a shared machine, the cores are equally fast.
template <class Args>
void launch(const Kernel<Args>& kernel, Args* calls, int64_t count) {
  const int64_t threads = threads_here();
  int64_t tasks = 0, bytes = 0;
  std::vector<int64_t> first_task{0};  // of each call, and behind the last
  for (int64_t i = 0; i < count; i++) {
    first_task.push_back(tasks += kernel.tasks(calls[i], threads));
    bytes = std::max(bytes, kernel.scratch(calls[i]));
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(tasks, threads), 1, [&](int64_t, int64_t) {
    char* scratch = thread_scratch(bytes);
    int64_t call = 0;
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      while (task >= first_task[call + 1]) call++;
      kernel.run(calls[call], task - first_task[call], scratch);
    }
  });
}
// The same of one call, without the memory that a list of calls takes.
template <class Args>
void launch(const Kernel<Args>& kernel, Args& args) {
  const int64_t threads = threads_here(), tasks = kernel.tasks(args, threads), bytes = kernel.scratch(args);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(tasks, threads), 1, [&](int64_t, int64_t) {
    char* scratch = thread_scratch(bytes);
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) kernel.run(args, task, scratch);
  });
}

DType dtype_of(const Tensor& t);
Vector vector_of(const OptionalTensor& t);

// A tensor (..., width) with its rows as kernels.h wants them; the tensor itself, or a contiguous copy that it owns.
struct RowTensor {
  Tensor tensor;
  Rows rows;
  int64_t count = 0;
  explicit RowTensor(const Tensor& t);
};

// A weight (out, in); the tensor itself, or a contiguous copy that it owns.
struct WeightTensor {
  Tensor tensor;
  Matrix matrix;
  explicit WeightTensor(const Tensor& t);
};

// The dtype of the products of a backward pass with this weight.
at::ScalarType products_of(const Tensor& weight);

// A weight transposed, in that dtype, as the gradients of the inputs want it.
WeightTensor transposed(const Tensor& weight);

// The factor of linear_residual and layer_norm_mlp, a value per sample or per channel; owns a contiguous copy if it needs one.
struct ScaleTensor {
  Tensor tensor;
  Scale scale;
  ScaleTensor(const OptionalTensor& t, bool per_sample, const Tensor& x);
};

Norm norm_of(const Tensor& weight, const OptionalTensor& bias, double eps);

// Partial sums of the LayerNorm parameters' gradients, one row per task, and their total in the parameter's dtype.
struct NormGradients {
  Tensor weight, bias;
  NormGradients(bool weight_wanted, bool bias_wanted, int64_t tasks, int64_t width, const Tensor& like);
};
Tensor total(const Tensor& partial, const Tensor& parameter);

Tensor empty_like_dtype(at::IntArrayRef shape, at::ScalarType dtype);
inline Tensor empty_f32(at::IntArrayRef shape) { return empty_like_dtype(shape, at::kFloat); }
inline float* float_data(const Tensor& t) { return t.numel() ? t.data_ptr<float>() : nullptr; }

}  // namespace crossvit
