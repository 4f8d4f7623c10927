// linear_residual on a GPU: the product, with what is added in its last step (linear_ops.cpp).
#include "cuda/linear_ops.h"

namespace crossvit::cuda {

namespace {

Tensor linear_residual(const LinearResidual& a, bool tf32) {
  const Call call(a.x, tf32);
  const ScaleTensor factor(a.scale, a.residual);
  const ScalarType dtype = promoted(a.residual.scalar_type(), a.linear.weight.scalar_type());
  const Tensor out = empty(a.residual.sizes(), dtype, a.residual);
  linear_forward(call, a.x, a.linear, a.residual, factor.scale, out);
  return out;
}

std::vector<Tensor> linear_residual_backward(const LinearResidualBackward& a, bool tf32) {
  const Call call(a.x, tf32);
  const auto& [weight, bias] = a.linear;
  const ScaleTensor factor(a.scale, a.grad_out);
  std::vector<Tensor> result;
  if (a.needs.x || a.needs.weight || a.needs.bias) {
    const RowTensor grad = product_gradient(call, a.grad_out, factor.scale, {}, weight.scalar_type());
    if (a.needs.x) result.push_back(input_gradient(call, grad, weight).view(a.x.sizes()));
    parameter_gradients(call, grad, a.x, weight, bias ? bias->scalar_type() : weight.scalar_type(), a.needs.weight,
                        a.needs.bias, result);
  }
  if (a.needs.scale) result.push_back(scale_gradient(call, a.grad_out, a.x, a.linear, a.scale));
  return result;
}

const Library of_linear_residual = ops().define<linear_residual>().define<linear_residual_backward>();

}  // namespace

}  // namespace crossvit::cuda
