// layer_norm_linear on the CPU: act(Linear(pre_act(LayerNorm(x)))) over row panels (linear.h), and its gradients (grad.h).
#include "launch.h"
#include "ops.h"

namespace crossvit {

namespace unchecked {

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_linear(const Tensor& x, const Tensor& norm_weight,
                                                             const OptionalTensor& norm_bias, const Tensor& weight,
                                                             const OptionalTensor& bias, double eps, bool gelu_in,
                                                             bool gelu_out, bool save) {
  const RowTensor in(x);
  const WeightTensor matrix(weight);
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  const Tensor out = empty(shape, weight.scalar_type());
  const Tensor mean = empty_f32({save ? in.count : 0}), rstd = empty_f32({save ? in.count : 0});
  const Tensor pre = empty({save && gelu_out ? in.count : 0, weight.size(0)}, weight.scalar_type());

  LinearArgs args{};
  args.x = rows_of(in);
  args.out = rows_of(RowTensor(out));
  if (pre.numel()) args.pre = rows_of(RowTensor(pre));
  args.rows = in.count;
  args.in = x.size(-1);
  args.out_features = weight.size(0);
  args.norm = norm_of(norm_weight, norm_bias, eps);
  args.norm.mean = float_data(mean);
  args.norm.rstd = float_data(rstd);
  args.gelu_in = gelu_in;
  args.gelu_out = gelu_out;
  args.weight = matrix.matrix;
  args.bias = vector_of(bias);
  launch(active().linear, args);
  return {out, mean, rstd, pre};
}

}  // namespace unchecked

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_linear(const Tensor& x, const Tensor& norm_weight,
                                                             const OptionalTensor& norm_bias, const Tensor& weight,
                                                             const OptionalTensor& bias, double eps, bool gelu_in,
                                                             bool gelu_out, bool save) {
  arguments::layer_norm_linear(kTaken, x, norm_weight, norm_bias, weight, bias, eps);
  return unchecked::layer_norm_linear(x, norm_weight, norm_bias, weight, bias, eps, gelu_in, gelu_out, save);
}

std::vector<Tensor> layer_norm_linear_backward(const Tensor& grad_out, const Tensor& x, const Tensor& norm_weight,
                                               const OptionalTensor& norm_bias, const Tensor& weight,
                                               const Tensor& mean, const Tensor& rstd, const Tensor& pre, bool gelu_in,
                                               bool gelu_out, NeedsList list, bool wide) {
  const auto needs = arguments::layer_norm_linear_backward(kTaken, grad_out, x, norm_weight, norm_bias, weight, mean,
                                                           rstd, pre, gelu_out, list);
  const RowTensor grad(grad_out), in(x);
  LinearGradArgs args{};
  args.grad = rows_of(grad);
  if (gelu_out) args.pre = rows_of(RowTensor(pre));
  args.x = rows_of(in);
  args.rows = in.count;
  args.norm = norm_of(norm_weight, norm_bias, 0);
  args.norm.mean = float_data(mean);
  args.norm.rstd = float_data(rstd);
  args.gelu_in = gelu_in;
  args.gelu_out = gelu_out;
  return linear_gradients(args, x, weight, norm_weight, norm_bias, weight.scalar_type(), wide, needs);
}

}  // namespace crossvit
