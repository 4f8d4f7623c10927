// The torch side of what layer_norm_linear, linear_residual and layer_norm_mlp share.
#pragma once

#include <vector>

#include "cuda/check.h"
#include "cuda/layer_norm_linear.h"
#include "cuda/linear.h"

namespace crossvit::cuda {

// A scale for the rows of x; owns a float32 copy if it needs one.
struct ScaleTensor {
  Tensor tensor;
  Scale scale;
  ScaleTensor(const ScaleParams& params, const Tensor& x);
};

// In what follows a tensor that is optional is not defined, or empty, where it is not there.

// out (..., E) = residual + scale * Linear(x), residual of out's dtype; without a residual Linear(x).
void linear_forward(const Call& call, const Tensor& x, const LinearParams& linear, const Tensor& residual,
                    const Scale& scale, const Tensor& out);

// What layer_norm_linear computes, into `out` and, of those that have rows, mean, rstd and pre.
void layer_norm_linear_forward(const Call& call, const LayerNormLinear& a, const Tensor& out, const Tensor& mean,
                               const Tensor& rstd, const Tensor& pre);

// scale * grad_out * gelu'(pre) in this dtype; grad_out itself where that is all. `pre` is optional.
RowTensor product_gradient(const Call& call, const Tensor& grad_out, const Scale& scale, const Tensor& pre,
                           ScalarType dtype);

// grad weight, (rows, D); where the Linear's input was gelu(pre) the gradient of pre, and `activated` becomes the input.
Tensor input_gradient(const Call& call, const RowTensor& grad, const Tensor& weight, const Tensor& pre = {},
                      const Tensor& activated = {});

// Appends those of the gradients of a Linear's weight and bias that are wanted; x is the Linear's input.
void parameter_gradients(const Call& call, const RowTensor& grad, const Tensor& x, const Tensor& weight,
                         ScalarType bias_dtype, bool weight_wanted, bool bias_wanted, std::vector<Tensor>& result);

// Gives those of layer_norm_linear's gradients that are needed, from that of the Linear's output; `add` is added to x's.
std::vector<Tensor> layer_norm_linear_gradients(const Call& call, const RowTensor& grad, const Tensor& x,
                                                const NormParams& norm, const Tensor& weight, const Tensor& mean,
                                                const Tensor& rstd, bool gelu_in, const LayerNormLinearNeeds& needs,
                                                const Tensor& add);

// The gradient of `scale` in residual + scale * Linear(x).
Tensor scale_gradient(const Call& call, const Tensor& grad_out, const Tensor& x, const LinearParams& linear,
                      const ScaleParams& scale);

}  // namespace crossvit::cuda
