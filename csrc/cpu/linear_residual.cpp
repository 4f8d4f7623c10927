// linear_residual on the CPU: residual + scale * Linear(x) over row panels (linear.h), and its gradients (grad.h).
#include "launch.h"
#include "ops.h"

namespace crossvit {

namespace unchecked {

Tensor linear_residual(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& residual,
                       const OptionalTensor& scale, bool per_sample) {
  const RowTensor in(x), base(residual);
  const WeightTensor matrix(weight);
  const ScaleTensor factor(scale, per_sample, residual);
  const Tensor out = empty(residual.sizes(), promoted(residual.scalar_type(), weight.scalar_type()));

  LinearArgs args{};
  args.x = rows_of(in);
  args.out = rows_of(RowTensor(out));
  args.residual = rows_of(base);
  args.rows = in.count;
  args.in = x.size(-1);
  args.out_features = weight.size(0);
  args.weight = matrix.matrix;
  args.bias = vector_of(bias);
  args.scale = factor.scale;
  launch(active().linear, args);
  return out;
}

}  // namespace unchecked

Tensor linear_residual(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& residual,
                       const OptionalTensor& scale, bool per_sample) {
  arguments::linear_residual(kTaken, x, weight, bias, residual, scale, per_sample);
  return unchecked::linear_residual(x, weight, bias, residual, scale, per_sample);
}

std::vector<Tensor> linear_residual_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                             const OptionalTensor& bias, const OptionalTensor& scale, bool per_sample,
                                             NeedsList list, bool wide) {
  const auto needs = arguments::linear_residual_backward(kTaken, grad_out, x, weight, bias, scale, per_sample, list);
  const RowTensor grad(grad_out), in(x);
  const ScaleTensor factor(scale, per_sample, grad_out);
  std::vector<Tensor> result;
  if (needs.x || needs.weight || needs.bias) {
    LinearGradArgs args{};
    args.grad = rows_of(grad);
    args.x = rows_of(in);
    args.rows = in.count;
    args.scale = factor.scale;
    result = linear_gradients(args, x, weight, {}, {}, bias ? bias->scalar_type() : weight.scalar_type(), wide,
                              {.x = needs.x, .weight = needs.weight, .bias = needs.bias});
  }
  if (needs.scale) {
    const bool per_sample = factor.scale.kind == Scale::sample;
    const Tensor unscaled = per_sample ? input_gradient(grad, x.sizes(), weight) : Tensor();
    result.push_back(scale_gradient(grad_out, x, weight, bias, *scale, unscaled, factor.scale.kind));
  }
  return result;
}

}  // namespace crossvit
