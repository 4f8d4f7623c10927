// layer_norm_mlp on the CPU: x + scale * Linear2(gelu(Linear1(LayerNorm(x)))) over row panels (mlp.h), and its gradients.
#include "launch.h"
#include "ops.h"

#include <ATen/ops/gelu.h>

namespace crossvit {

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_mlp(const Tensor& x, const Tensor& norm_weight,
                                                          const OptionalTensor& norm_bias, const Tensor& w1,
                                                          const OptionalTensor& b1, const Tensor& w2,
                                                          const OptionalTensor& b2, double eps,
                                                          const OptionalTensor& scale, bool save) {
  const RowTensor in(x);
  const WeightTensor first(w1), second(w2);
  const ScaleTensor factor(scale, x);
  const Tensor out = empty_like_dtype(x.sizes(), c10::promoteTypes(x.scalar_type(), w2.scalar_type()));
  const Tensor mean = empty_f32({save ? in.count : 0}), rstd = empty_f32({save ? in.count : 0});
  const Tensor pre = empty_like_dtype({save ? in.count : 0, w1.size(0)}, w1.scalar_type());

  MlpArgs args{};
  args.x = in.rows;
  args.out = RowTensor(out).rows;
  if (pre.numel()) args.pre = RowTensor(pre).rows;
  args.rows = in.count;
  args.width = x.size(-1);
  args.hidden = w1.size(0);
  args.norm = norm_of(norm_weight, norm_bias, eps);
  args.norm.mean = float_data(mean);
  args.norm.rstd = float_data(rstd);
  args.w1 = first.matrix;
  args.w2 = second.matrix;
  args.b1 = vector_of(b1);
  args.b2 = vector_of(b2);
  args.scale = factor.scale;
  launch(active().mlp, args);
  return {out, mean, rstd, pre};
}

std::vector<Tensor> layer_norm_mlp_backward(const Tensor& grad_out, const Tensor& x, const Tensor& norm_weight,
                                            const OptionalTensor& norm_bias, const Tensor& w1, const Tensor& w2,
                                            const OptionalTensor& b2, const OptionalTensor& scale, const Tensor& mean,
                                            const Tensor& rstd, const Tensor& pre, Needs needs) {
  const RowTensor grad(grad_out), in(x), hidden(pre);
  const ScaleTensor factor(scale, x);
  Norm norm = norm_of(norm_weight, norm_bias, 0);
  norm.mean = float_data(mean);
  norm.rstd = float_data(rstd);
  std::vector<Tensor> result;

  Tensor grad_hidden;
  if (needs.get(0) || needs.get(1) || needs.get(2) || needs.get(3) || needs.get(4)) {
    const WeightTensor w1_t = transposed(w1), w2_t = transposed(w2);
    MlpGradInputArgs args{};
    args.grad = grad.rows;
    args.pre = hidden.rows;
    args.x = in.rows;
    args.rows = in.count;
    args.width = x.size(-1);
    args.hidden = w1.size(0);
    args.norm = norm;
    args.w1_t = w1_t.matrix;
    args.w2_t = w2_t.matrix;
    args.scale = factor.scale;
    const NormGradients partial(needs.get(1), needs.get(2), active().mlp_grad_input.tasks(args, threads_here()),
                                args.width, x);
    args.grad_norm_weight = needs.get(1) ? float_data(partial.weight) : nullptr;
    args.grad_norm_bias = needs.get(2) ? float_data(partial.bias) : nullptr;
    if (needs.get(3) || needs.get(4)) {
      grad_hidden = empty_f32({in.count, w1.size(0)});
      args.grad_hidden = RowTensor(grad_hidden).rows;
    }
    if (needs.get(0)) {
      result.push_back(empty_like_dtype(x.sizes(), x.scalar_type()));
      args.grad_x = RowTensor(result.back()).rows;
    }
    launch(active().mlp_grad_input, args);
    if (needs.get(1)) result.push_back(total(partial.weight, norm_weight));
    if (needs.get(2)) result.push_back(total(partial.bias, norm_bias ? *norm_bias : norm_weight));
  }
  if (needs.get(3) || needs.get(4))
    weight_gradients(RowTensor(grad_hidden).rows, {}, in.rows, in.count, norm, false, false, Scale{}, w1,
                     w1.scalar_type(), needs.get(3), needs.get(4), result);
  // The second product's input is gelu(pre): made again on the way in.
  if (needs.get(5) || needs.get(6))
    weight_gradients(grad.rows, {}, hidden.rows, in.count, Norm{}, true, false, factor.scale, w2, w2.scalar_type(),
                     needs.get(5), needs.get(6), result);
  if (needs.get(7)) {
    const Tensor activated = at::gelu(pre.to(at::kFloat));
    Tensor unscaled;
    if (factor.scale.kind == Scale::sample) {
      const WeightTensor w2_t = transposed(w2);
      unscaled = empty_f32(pre.sizes());
      LinearGradInputArgs args{};
      args.grad = grad.rows;
      args.grad_x = RowTensor(unscaled).rows;
      args.rows = in.count;
      args.in = w2.size(1);
      args.out_features = w2.size(0);
      args.weight_t = w2_t.matrix;
      launch(active().linear_grad_input, args);
    }
    result.push_back(scale_gradient(grad_out, activated, w2, b2, *scale, unscaled, factor.scale.kind));
  }
  return result;
}

}  // namespace crossvit
