// The torch side of what layer_norm_linear, linear_residual and layer_norm_mlp share.
#pragma once

#include <vector>

#include "cuda/check.h"
#include "cuda/layer_norm_linear.h"
#include "cuda/linear.h"

namespace crossvit::cuda {

// A scale with a value per sample or per channel, for the rows of x; owns a float32 copy if it needs one.
struct ScaleTensor {
  Tensor tensor;
  Scale scale;
  ScaleTensor() = default;
  ScaleTensor(const OptionalTensor& t, bool per_sample, const Tensor& x);
};

// out (..., E) = residual + scale * Linear(x), residual of out's dtype; without a residual Linear(x).
void linear_forward(const Call& call, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                    const OptionalTensor& residual, const Scale& scale, const Tensor& out);

// What layer_norm_linear computes, into `out` and, of those that have rows, mean, rstd and pre.
struct NormLinearResults {
  const Tensor &out, &mean, &rstd, &pre;
};
void layer_norm_linear_forward(const Call& call, const Tensor& x, const Tensor& norm_weight,
                               const OptionalTensor& norm_bias, const Tensor& weight, const OptionalTensor& bias,
                               double eps, bool gelu_in, bool gelu_out, const NormLinearResults& results);

// scale * grad_out * gelu'(pre) in this dtype; grad_out itself where that is all. `pre` is optional.
RowTensor product_gradient(const Call& call, const Tensor& grad_out, const Scale& scale, const OptionalTensor& pre,
                           ScalarType dtype);

// grad weight, (rows, D); where the Linear's input was gelu(pre) the gradient of pre, and `activated` becomes the input.
Tensor input_gradient(const Call& call, const RowTensor& grad, const Tensor& weight, const OptionalTensor& pre,
                      const OptionalTensor& activated);

// Appends those of the gradients of a Linear's weight and bias that are wanted; x is the Linear's input.
void parameter_gradients(const Call& call, const RowTensor& grad, const Tensor& x, const Tensor& weight,
                         ScalarType bias_dtype, bool weight_wanted, bool bias_wanted, std::vector<Tensor>& result);

// Gives those of layer_norm_linear's gradients that are needed, from that of the Linear's output; `add` is added to x's.
std::vector<Tensor> layer_norm_linear_gradients(const Call& call, const RowTensor& grad, const Tensor& x,
                                                const Tensor& norm_weight, const OptionalTensor& norm_bias,
                                                const Tensor& weight, ScalarType bias_dtype, const Tensor& mean,
                                                const Tensor& rstd, bool gelu_in, const LayerNormLinearNeeds& needs,
                                                const OptionalTensor& add);

// The gradient of `scale` in residual + scale * Linear(x).
Tensor scale_gradient(const Call& call, const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                      const OptionalTensor& bias, const Tensor& scale, Scale::Kind kind);

}  // namespace crossvit::cuda
