// linear_residual on the CPU: residual + scale * Linear(x) over row panels (linear.h), and its gradients (grad.h).
#include "launch.h"
#include "ops.h"

#include <ATen/ops/empty.h>

namespace crossvit {

Tensor linear_residual(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& residual,
                       const OptionalTensor& scale) {
  const RowTensor in(x), base(residual);
  const WeightTensor matrix(weight);
  const ScaleTensor factor(scale, residual);
  const Tensor out =
      empty_like_dtype(residual.sizes(), c10::promoteTypes(residual.scalar_type(), weight.scalar_type()));

  LinearArgs args{};
  args.x = in.rows;
  args.out = RowTensor(out).rows;
  args.residual = base.rows;
  args.rows = in.count;
  args.in = x.size(-1);
  args.out_features = weight.size(0);
  args.weight = matrix.matrix;
  args.bias = vector_of(bias);
  args.scale = factor.scale;
  launch(active().linear, args);
  return out;
}

void weight_gradients(const Rows& grad, const Rows& pre, const Rows& x, int64_t rows, const Norm& norm, bool gelu_in,
                      bool gelu_out, const Scale& scale, const Tensor& weight, at::ScalarType bias_dtype,
                      bool weight_wanted, bool bias_wanted, std::vector<Tensor>& result) {
  WeightGradArgs args{};
  args.grad = grad;
  args.pre = pre;
  args.x = x;
  args.rows = rows;
  args.in = weight.size(1);
  args.out_features = weight.size(0);
  args.norm = norm;
  args.gelu_in = gelu_in;
  args.gelu_out = gelu_out;
  args.scale = scale;
  if (weight_wanted) {
    result.push_back(empty_like_dtype(weight.sizes(), weight.scalar_type()));
    args.grad_weight = RowTensor(result.back()).rows;
  }
  if (bias_wanted) {
    result.push_back(empty_like_dtype({weight.size(0)}, bias_dtype));
    args.grad_bias = result.back().data_ptr();
    args.grad_bias_dtype = dtype_of(result.back());
  }
  launch(active().weight_grad, args);
}

std::vector<Tensor> linear_residual_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                             const OptionalTensor& bias, const OptionalTensor& scale, Needs needs) {
  const RowTensor grad(grad_out), in(x);
  const ScaleTensor factor(scale, grad_out);
  const bool scale_wanted = needs.get(3);
  std::vector<Tensor> result;
  Tensor unscaled;  // grad_out W, which the scale's gradient is made of
  if (needs.get(0) || (scale_wanted && factor.scale.kind == Scale::sample)) {
    const WeightTensor weight_t = transposed(weight);
    LinearGradInputArgs args{};
    args.grad = grad.rows;
    args.rows = in.count;
    args.in = x.size(-1);
    args.out_features = weight.size(0);
    args.weight_t = weight_t.matrix;
    if (needs.get(0)) {
      args.scale = factor.scale;
      result.push_back(empty_like_dtype(x.sizes(), x.scalar_type()));
      args.grad_x = RowTensor(result.back()).rows;
      launch(active().linear_grad_input, args);
    }
    if (scale_wanted && factor.scale.kind == Scale::sample) {
      unscaled = empty_f32(x.sizes());
      args.scale = Scale{};
      args.grad_x = RowTensor(unscaled).rows;
      launch(active().linear_grad_input, args);
    }
  }
  if (needs.get(1) || needs.get(2))
    weight_gradients(grad.rows, {}, in.rows, in.count, Norm{}, false, false, factor.scale, weight,
                     bias ? bias->scalar_type() : weight.scalar_type(), needs.get(1), needs.get(2), result);
  if (scale_wanted) result.push_back(scale_gradient(grad_out, x, weight, bias, *scale, unscaled, factor.scale.kind));
  return result;
}

// d scale = sum of grad_out * Linear(x) over what the scale spans, without making Linear(x) again: per channel it is
// W . (grad_out^T x) + b . sum(grad_out), per sample x . (grad_out W) + grad_out . b,
// a long sum that cancels: in float64.
Tensor scale_gradient(const Tensor& grad_out, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      const Tensor& scale, const Tensor& unscaled, Scale::Kind kind) {
  Tensor result;
  if (kind == Scale::channel) {
    std::vector<Tensor> gradients;
    const RowTensor grad(grad_out), in(x);
    const Tensor like = at::empty({weight.size(0), weight.size(1)}, at::dtype(at::kFloat));
    weight_gradients(grad.rows, {}, in.rows, in.count, Norm{}, false, false, Scale{}, like, at::kFloat, true, true,
                     gradients);
    result = gradients[0].mul(weight.to(at::kFloat)).sum(1);
    if (bias) result = result.add(gradients[1].mul(bias->to(at::kFloat)));
  } else {
    const int64_t samples = grad_out.size(0);
    result = unscaled.mul(x.to(at::kDouble)).reshape({samples, -1}).sum(1);
    if (bias) result = result.add(grad_out.to(at::kDouble).mul(bias->to(at::kDouble)).reshape({samples, -1}).sum(1));
  }
  return result.reshape(scale.sizes()).to(scale.scalar_type());
}

}  // namespace crossvit
