// layer_norm_linear on the CPU: act(Linear(pre_act(LayerNorm(x)))) over row panels (linear.h), and its gradients (grad.h).
#include "launch.h"
#include "ops.h"

namespace crossvit {

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_linear(const Tensor& x, const Tensor& norm_weight,
                                                             const OptionalTensor& norm_bias, const Tensor& weight,
                                                             const OptionalTensor& bias, double eps, bool gelu_in,
                                                             bool gelu_out, bool save) {
  const RowTensor in(x);
  const WeightTensor matrix(weight);
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  const Tensor out = empty_like_dtype(shape, weight.scalar_type());
  const Tensor mean = empty_f32({save ? in.count : 0}), rstd = empty_f32({save ? in.count : 0});
  const Tensor pre = empty_like_dtype({save && gelu_out ? in.count : 0, weight.size(0)}, weight.scalar_type());

  LinearArgs args{};
  args.x = in.rows;
  args.out = RowTensor(out).rows;
  if (pre.numel()) args.pre = RowTensor(pre).rows;
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

std::vector<Tensor> layer_norm_linear_backward(const Tensor& grad_out, const Tensor& x, const Tensor& norm_weight,
                                               const OptionalTensor& norm_bias, const Tensor& weight,
                                               const Tensor& mean, const Tensor& rstd, const Tensor& pre, bool gelu_in,
                                               bool gelu_out, Needs needs) {
  const RowTensor grad(grad_out), in(x);
  Rows pre_rows;
  if (gelu_out) pre_rows = RowTensor(pre).rows;
  Norm norm = norm_of(norm_weight, norm_bias, 0);
  norm.mean = float_data(mean);
  norm.rstd = float_data(rstd);
  std::vector<Tensor> result;

  if (needs.get(0) || needs.get(1) || needs.get(2)) {
    const WeightTensor weight_t = transposed(weight);
    LinearGradInputArgs args{};
    args.grad = grad.rows;
    args.pre = pre_rows;
    args.x = in.rows;
    args.rows = in.count;
    args.in = x.size(-1);
    args.out_features = weight.size(0);
    args.norm = norm;
    args.gelu_in = gelu_in;
    args.gelu_out = gelu_out;
    args.weight_t = weight_t.matrix;
    const NormGradients partial(needs.get(1), needs.get(2), active().linear_grad_input.tasks(args, threads_here()),
                                args.in, x);
    args.grad_norm_weight = needs.get(1) ? float_data(partial.weight) : nullptr;
    args.grad_norm_bias = needs.get(2) ? float_data(partial.bias) : nullptr;
    if (needs.get(0)) {
      result.push_back(empty_like_dtype(x.sizes(), x.scalar_type()));
      args.grad_x = RowTensor(result.back()).rows;
    }
    launch(active().linear_grad_input, args);
    if (needs.get(1)) result.push_back(total(partial.weight, norm_weight));
    if (needs.get(2)) result.push_back(total(partial.bias, norm_bias ? *norm_bias : norm_weight));
  }
  if (needs.get(3) || needs.get(4))
    weight_gradients(grad.rows, pre_rows, in.rows, in.count, norm, gelu_in, gelu_out, Scale{}, weight,
                     weight.scalar_type(), needs.get(3), needs.get(4), result);
  return result;
}

}  // namespace crossvit
