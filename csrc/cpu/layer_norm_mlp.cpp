// layer_norm_mlp on the CPU: x + scale * Linear2(gelu(Linear1(LayerNorm(x)))) over row panels (mlp.h), and its gradients.
#include "launch.h"
#include "ops.h"
#include "torch_c/aten.h"

namespace crossvit {

namespace unchecked {

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_mlp(const Tensor& x, const Tensor& norm_weight,
                                                          const OptionalTensor& norm_bias, const Tensor& w1,
                                                          const OptionalTensor& b1, const Tensor& w2,
                                                          const OptionalTensor& b2, double eps,
                                                          const OptionalTensor& scale, bool per_sample, bool save) {
  const RowTensor in(x);
  const WeightTensor w1_matrix(w1), w2_matrix(w2);
  const ScaleTensor factor(scale, per_sample, x);
  const Tensor out = empty(x.sizes(), promoted(x.scalar_type(), w2.scalar_type()));
  const Tensor mean = empty_f32({save ? in.count : 0}), rstd = empty_f32({save ? in.count : 0});
  const Tensor pre = empty({save ? in.count : 0, w1.size(0)}, w1.scalar_type());

  MlpArgs args{};
  args.x = rows_of(in);
  args.out = rows_of(RowTensor(out));
  if (pre.numel()) args.pre = rows_of(RowTensor(pre));
  args.rows = in.count;
  args.width = x.size(-1);
  args.hidden = w1.size(0);
  args.norm = norm_of(norm_weight, norm_bias, eps);
  args.norm.mean = float_data(mean);
  args.norm.rstd = float_data(rstd);
  args.w1 = w1_matrix.matrix;
  args.w2 = w2_matrix.matrix;
  args.b1 = vector_of(b1);
  args.b2 = vector_of(b2);
  args.scale = factor.scale;
  launch(active().mlp, args);
  return {out, mean, rstd, pre};
}

}  // namespace unchecked

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_mlp(const Tensor& x, const Tensor& norm_weight,
                                                          const OptionalTensor& norm_bias, const Tensor& w1,
                                                          const OptionalTensor& b1, const Tensor& w2,
                                                          const OptionalTensor& b2, double eps,
                                                          const OptionalTensor& scale, bool per_sample, bool save) {
  arguments::layer_norm_mlp(kTaken, x, norm_weight, norm_bias, w1, b1, w2, b2, eps, scale, per_sample);
  return unchecked::layer_norm_mlp(x, norm_weight, norm_bias, w1, b1, w2, b2, eps, scale, per_sample, save);
}

std::vector<Tensor> layer_norm_mlp_backward(const Tensor& grad_out, const Tensor& x, const Tensor& norm_weight,
                                            const OptionalTensor& norm_bias, const Tensor& w1, const Tensor& w2,
                                            const OptionalTensor& b2, const OptionalTensor& scale, bool per_sample,
                                            const Tensor& mean, const Tensor& rstd, const Tensor& pre, NeedsList list,
                                            bool wide) {
  const auto needs = arguments::layer_norm_mlp_backward(kTaken, grad_out, x, norm_weight, norm_bias, w1, w2, b2, scale,
                                                        per_sample, mean, rstd, pre, list);
  const RowTensor grad(grad_out), in(x), hidden(pre);
  const ScaleTensor factor(scale, per_sample, x);
  const bool below = needs.x || needs.norm_weight || needs.norm_bias;
  const int64_t width = x.size(-1), features = w1.size(0);
  std::vector<Tensor> result;

  MlpGradArgs args{};
  args.grad = rows_of(grad);
  args.pre = rows_of(hidden);
  args.x = rows_of(in);
  args.rows = in.count;
  args.width = width;
  args.hidden = features;
  args.norm = norm_of(norm_weight, norm_bias, 0);
  args.norm.mean = float_data(mean);
  args.norm.rstd = float_data(rstd);
  args.products = products_of(w1) == kFloat32 ? DType::float32 : DType::bfloat16;
  args.scale = factor.scale;
  const WeightOperands w1_operands(w1, in.count, features, width, needs.w1 || needs.b1, needs.w1);
  const WeightOperands w2_operands(w2, in.count, features, width, needs.w2, needs.w2 || needs.b2);
  args.left1 = w1_operands.left_data();
  args.right1 = w1_operands.right_data();
  args.left2 = w2_operands.left_data();
  args.right2 = w2_operands.right_data();
  std::optional<WeightTensor> w1_t, w2_t;
  if (below) args.w1_t = w1_t.emplace(transposed(w1)).matrix;
  if (below || args.left1) args.w2_t = w2_t.emplace(transposed(w2)).matrix;
  const auto plan = active().mlp_grad.plan(args, threads_here());
  const NormGradients partial(needs.norm_weight, needs.norm_bias, plan.tasks, width, x);
  args.grad_norm_weight = needs.norm_weight ? float_data(partial.weight) : nullptr;
  args.grad_norm_bias = needs.norm_bias ? float_data(partial.bias) : nullptr;
  if (needs.x) {
    result.push_back(empty(x.sizes(), x.scalar_type()));
    args.grad_x = rows_of(RowTensor(result.back()));
  }
  if (below || args.left1 || args.right2) launch(active().mlp_grad, args, plan);
  if (needs.norm_weight) result.push_back(total(partial.weight, norm_weight));
  if (needs.norm_bias) result.push_back(total(partial.bias, norm_bias ? *norm_bias : norm_weight));
  std::vector<WeightGradArgs> calls;
  if (needs.w1 || needs.b1)
    calls.push_back(
        weight_gradient_call(w1_operands, in.count, w1, w1.scalar_type(), wide, false, needs.w1, needs.b1, result));
  if (needs.w2 || needs.b2)
    calls.push_back(
        weight_gradient_call(w2_operands, in.count, w2, w2.scalar_type(), wide, true, needs.w2, needs.b2, result));
  launch(active().weight_grad, calls);
  if (needs.scale) {
    const Tensor activated = aten::gelu(pre.to(kFloat32));
    const bool per_sample = factor.scale.kind == Scale::sample;
    const Tensor unscaled = per_sample ? input_gradient(grad, activated.sizes(), w2) : Tensor();
    result.push_back(scale_gradient(grad_out, activated, w2, b2, *scale, unscaled, factor.scale.kind));
  }
  return result;
}

}  // namespace crossvit
