// linear_residual on a GPU: the product, with what is added in its last step (linear_ops.cpp).
#include "cuda/linear_ops.h"

namespace crossvit::cuda {

Tensor linear_residual(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& residual,
                       const OptionalTensor& scale, bool per_sample) {
  arguments::linear_residual(taken(), x, weight, bias, residual, scale, per_sample);
  const DeviceGuard guard(x.device());
  const ScaleTensor factor(scale, per_sample, residual);
  const Tensor out = empty(residual.sizes(), c10::promoteTypes(residual.scalar_type(), weight.scalar_type()), residual);
  linear_forward(x, weight, bias, residual, factor.scale, out);
  return out;
}

std::vector<Tensor> linear_residual_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                             const OptionalTensor& bias, const OptionalTensor& scale, bool per_sample,
                                             NeedsList list) {
  const auto needs = arguments::linear_residual_backward(taken(), grad_out, x, weight, bias, scale, per_sample, list);
  const DeviceGuard guard(x.device());
  const ScaleTensor factor(scale, per_sample, grad_out);
  std::vector<Tensor> result;
  if (needs.x || needs.weight || needs.bias) {
    const RowTensor grad = product_gradient(grad_out, factor.scale, {}, weight.scalar_type());
    if (needs.x) result.push_back(input_gradient(grad, weight, {}, {}).view(x.sizes()));
    parameter_gradients(grad, x, weight, bias ? bias->scalar_type() : weight.scalar_type(), needs.weight, needs.bias,
                        result);
  }
  if (needs.scale) result.push_back(scale_gradient(grad_out, x, weight, bias, *scale, factor.scale.kind));
  return result;
}

}  // namespace crossvit::cuda

TORCH_LIBRARY_FRAGMENT(crossvit_kernels_cuda, m) {
  crossvit::cuda::define(m, crossvit::schema::linear_residual, TORCH_FN(crossvit::cuda::linear_residual));
  crossvit::cuda::define(m, crossvit::schema::linear_residual_backward.cuda(),
                         TORCH_FN(crossvit::cuda::linear_residual_backward));
}
