// linear_residual on the CPU: residual + scale * Linear(x) over row panels (linear.h), and its gradients (grad.h).
#include "ops.h"

namespace crossvit {

Tensor linear_residual(const LinearResidual& a) {
  const RowTensor in(a.x), base(a.residual);
  const ScaleTensor factor(a.scale, a.residual);
  const Tensor out = empty(a.residual.sizes(), promoted(a.residual.scalar_type(), a.linear.weight.scalar_type()));
  multiply({.out = rows_of(out), .residual = rows_of(base), .scale = factor.scale}, in, a.linear);
  return out;
}

namespace {

std::vector<Tensor> linear_residual_backward(const LinearResidualBackward& a, bool wide) {
  const auto& [weight, bias] = a.linear;
  const RowTensor grad(a.grad_out), in(a.x);
  const ScaleTensor factor(a.scale, a.grad_out);
  std::vector<Tensor> result;
  if (a.needs.x || a.needs.weight || a.needs.bias)
    result = linear_gradients({.grad = rows_of(grad), .x = rows_of(in), .rows = in.count, .scale = factor.scale}, a.x,
                              weight, nullptr, bias ? bias->scalar_type() : weight.scalar_type(), wide,
                              {.x = a.needs.x, .weight = a.needs.weight, .bias = a.needs.bias});
  if (a.needs.scale) result.push_back(scale_gradient(a.grad_out, a.x, a.linear, a.scale));
  return result;
}

const Library of_linear_residual = ops().define<linear_residual>().define<linear_residual_backward>();

}  // namespace

}  // namespace crossvit
