// Torch tensors in, kernels run: the views that kernels.h wants of a tensor, and the loop over a kernel's tasks.
#pragma once

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "arguments.h"
#include "instruction_sets.h"
#include "views.h"

namespace crossvit {

// Memory of this thread, at least `bytes` long and aligned to a cache line; kept from call to call.
char* thread_scratch(int64_t bytes);

// How many threads a call may have here: PyTorch's number, or this thread alone where it is one of several already.
int64_t threads_here();

// Calls run() on so many of PyTorch's threads.
template <class Run>
void on_threads(int64_t threads, const Run& run) {
  if (threads <= 1) return run();
  const auto call = [](int64_t, int64_t, void* context) { (*static_cast<const Run*>(context))(); };
  checked(torch_parallel_for(0, threads, 1, call, const_cast<Run*>(&run)));
}

// Runs the tasks of a call on torch's threads. They are handed out one by one, since neither the tasks nor, on a shared machine,
// the cores are equally fast. A plan that a caller has asked for already is the third argument.
template <class Args, class P>
void launch(const Kernel<Args, P>& kernel, const Args& args, const P& plan) {
  const int64_t bytes = kernel.scratch(args, plan);
  std::atomic<int64_t> next{0};
  on_threads(std::min(plan.tasks, threads_here()), [&] {
    char* scratch = thread_scratch(bytes);
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < plan.tasks;)
      kernel.run(args, plan, task, scratch);
  });
}
template <class Args, class P>
void launch(const Kernel<Args, P>& kernel, const Args& args) {
  launch(kernel, args, kernel.plan(args, threads_here()));
}
// The tasks of several calls at once.
template <class Args, class P>
void launch(const Kernel<Args, P>& kernel, const std::vector<Args>& calls) {
  const int64_t threads = threads_here();
  std::vector<P> plans;
  std::vector<int64_t> first_task{0};  // of each call, and behind the last
  int64_t bytes = 0;
  for (const Args& args : calls) {
    plans.push_back(kernel.plan(args, threads));
    first_task.push_back(first_task.back() + plans.back().tasks);
    bytes = std::max(bytes, kernel.scratch(args, plans.back()));
  }
  const int64_t tasks = first_task.back();
  std::atomic<int64_t> next{0};
  on_threads(std::min(tasks, threads), [&] {
    char* scratch = thread_scratch(bytes);
    std::size_t call = 0;
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      while (task >= first_task[call + 1]) call++;
      kernel.run(calls[call], plans[call], task - first_task[call], scratch);
    }
  });
}

// Rows as the kernels take them; their memory is the tensor's. Of a contiguous tensor; none where it is empty.
Rows rows_of(const RowTensor& t);
inline Rows rows_of(const Tensor& t) { return t.numel() ? rows_of(RowTensor(t)) : Rows{}; }

// A weight (out, in): the tensor's own memory, or that of a contiguous copy. A tensor that is not handed over for good has to outlive
// this.
struct WeightTensor {
  Tensor owned;
  Matrix matrix;
  explicit WeightTensor(const Tensor& t) { view(t); }
  explicit WeightTensor(Tensor&& t) : owned(std::move(t)) { view(owned); }
  explicit WeightTensor(const Tensor&& t) : owned(t) { view(owned); }

 private:
  void view(const Tensor& t);
};

// The dtype of the products of a backward pass with this weight, and as the kernels know it.
ScalarType products_of(const Tensor& weight);
inline DType product_dtype(const Tensor& weight) { return dtype_of(products_of(weight)); }

// A weight transposed, in that dtype, as the gradients of the inputs want it.
WeightTensor transposed(const Tensor& weight);

// The factor of linear_residual and layer_norm_mlp; owns a contiguous copy if it needs one.
struct ScaleTensor {
  Tensor tensor;
  Scale scale;
  ScaleTensor(const ScaleParams& params, const Tensor& x);
};

// A LayerNorm whose statistics lie, or are to lie, in these tensors; not where they are empty.
Norm norm_of(const NormParams& norm, double eps, const Tensor& mean = {}, const Tensor& rstd = {});

inline const Device kOnCPU{kCPU, -1};
inline Tensor empty(Sizes shape, ScalarType dtype) { return empty(shape, dtype, kOnCPU); }
inline Tensor empty_f32(Sizes shape) { return empty(shape, kFloat32, kOnCPU); }

// The sums of the LayerNorm parameters' gradients that a kernel's `args` ask for, one row per task, and their totals, each in its
// parameter's dtype.
struct NormGradients {
  Tensor weight, bias;
  template <class Names, class Args>
  NormGradients(const Names& needs, int64_t tasks, int64_t width, Args& args) {
    if (needs.norm_weight) weight = empty_f32({tasks, width});
    if (needs.norm_bias) bias = empty_f32({tasks, width});
    args.grad_norm_weight = float_data(weight);
    args.grad_norm_bias = float_data(bias);
  }
  void append_to(std::vector<Tensor>& result, const NormParams& norm) const;
};

}  // namespace crossvit
