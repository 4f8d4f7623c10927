// layer_norm_mlp on a GPU: layer_norm_linear with gelu, then linear_residual onto the op's own input.

#include "cuda/linear_ops.h"
#include "torch_c/aten.h"

namespace crossvit::cuda {

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_mlp(const Tensor& x, const Tensor& norm_weight,
                                                          const OptionalTensor& norm_bias, const Tensor& w1,
                                                          const OptionalTensor& b1, const Tensor& w2,
                                                          const OptionalTensor& b2, double eps,
                                                          const OptionalTensor& scale, bool per_sample, bool save,
                                                          bool tf32) {
  arguments::layer_norm_mlp(taken(), x, norm_weight, norm_bias, w1, b1, w2, b2, eps, scale, per_sample);
  const Call call(x, tf32);
  const std::int64_t rows = x.numel() / x.size(-1);
  const ScaleTensor factor(scale, per_sample, x);
  const Tensor hidden = empty({rows, w1.size(0)}, w1.scalar_type(), x);
  const Tensor mean = empty_f32({save ? rows : 0}, x), rstd = empty_f32({save ? rows : 0}, x);
  const Tensor pre = empty({save ? rows : 0, w1.size(0)}, w1.scalar_type(), x);
  layer_norm_linear_forward(call, x, norm_weight, norm_bias, w1, b1, eps, false, true, {hidden, mean, rstd, pre});
  const Tensor out = empty(x.sizes(), promoted(x.scalar_type(), w2.scalar_type()), x);
  linear_forward(call, hidden, w2, b2, x, factor.scale, out);
  return {out, mean, rstd, pre};
}

std::vector<Tensor> layer_norm_mlp_backward(const Tensor& grad_out, const Tensor& x, const Tensor& norm_weight,
                                            const OptionalTensor& norm_bias, const Tensor& w1, const Tensor& w2,
                                            const OptionalTensor& b2, const OptionalTensor& scale, bool per_sample,
                                            const Tensor& mean, const Tensor& rstd, const Tensor& pre, NeedsList list,
                                            bool tf32) {
  const auto needs = arguments::layer_norm_mlp_backward(taken(), grad_out, x, norm_weight, norm_bias, w1, w2, b2, scale,
                                                        per_sample, mean, rstd, pre, list);
  const Call call(x, tf32);
  const ScaleTensor factor(scale, per_sample, x);
  const auto dtype = w2.scalar_type();
  const LayerNormLinearNeeds below{needs.x, needs.norm_weight, needs.norm_bias, needs.w1, needs.b1};
  const bool hidden_wanted = needs.w2 || needs.scale;
  const RowTensor grad = product_gradient(call, grad_out, factor.scale, {}, dtype);
  std::vector<Tensor> result;
  Tensor hidden;
  if (below.any()) {
    // The product's last step reads `pre` and makes gelu and its derivative of it, for all that follows.
    if (hidden_wanted) hidden = empty(pre.sizes(), dtype, pre);
    const RowTensor grad_pre(
        input_gradient(call, grad, w2, pre, hidden_wanted ? OptionalTensor(hidden) : OptionalTensor()));
    result = layer_norm_linear_gradients(call, grad_pre, x, norm_weight, norm_bias, w1, w1.scalar_type(), mean, rstd,
                                         false, below, grad_out);
  } else if (hidden_wanted) {
    hidden = aten::gelu(pre);
  }
  parameter_gradients(call, grad, hidden, w2, dtype, needs.w2, needs.b2, result);
  if (needs.scale) result.push_back(scale_gradient(call, grad_out, hidden, w2, b2, *scale, factor.scale.kind));
  return result;
}

const Library of_layer_norm_mlp = ops()
                                      .define<layer_norm_mlp>(schema::layer_norm_mlp.cuda())
                                      .define<layer_norm_mlp_backward>(schema::layer_norm_mlp_backward.cuda());

}  // namespace crossvit::cuda
