// linear_residual on a GPU: the product, with what is added in its last step (linear_ops.cpp).
#include "cuda/linear_ops.h"

namespace crossvit::cuda {

Tensor linear_residual(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& residual,
                       const OptionalTensor& scale, bool per_sample, bool tf32) {
  arguments::linear_residual(taken(), x, weight, bias, residual, scale, per_sample);
  const Call call(x, tf32);
  const ScaleTensor factor(scale, per_sample, residual);
  const Tensor out = empty(residual.sizes(), promoted(residual.scalar_type(), weight.scalar_type()), residual);
  linear_forward(call, x, weight, bias, residual, factor.scale, out);
  return out;
}

std::vector<Tensor> linear_residual_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                             const OptionalTensor& bias, const OptionalTensor& scale, bool per_sample,
                                             NeedsList list, bool tf32) {
  const auto needs = arguments::linear_residual_backward(taken(), grad_out, x, weight, bias, scale, per_sample, list);
  const Call call(x, tf32);
  const ScaleTensor factor(scale, per_sample, grad_out);
  std::vector<Tensor> result;
  if (needs.x || needs.weight || needs.bias) {
    const RowTensor grad = product_gradient(call, grad_out, factor.scale, {}, weight.scalar_type());
    if (needs.x) result.push_back(input_gradient(call, grad, weight, {}, {}).view(x.sizes()));
    parameter_gradients(call, grad, x, weight, bias ? bias->scalar_type() : weight.scalar_type(), needs.weight,
                        needs.bias, result);
  }
  if (needs.scale) result.push_back(scale_gradient(call, grad_out, x, weight, bias, *scale, factor.scale.kind));
  return result;
}

const Library of_linear_residual = ops()
                                       .define<linear_residual>(schema::linear_residual.cuda())
                                       .define<linear_residual_backward>(schema::linear_residual_backward.cuda());

}  // namespace crossvit::cuda
