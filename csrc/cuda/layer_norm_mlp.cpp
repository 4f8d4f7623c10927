// layer_norm_mlp on a GPU: layer_norm_linear with gelu, then linear_residual onto the op's own input.
#include <ATen/ops/gelu.h>

#include "cuda/linear_ops.h"

namespace crossvit::cuda {

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_mlp(const Tensor& x, const Tensor& norm_weight,
                                                          const OptionalTensor& norm_bias, const Tensor& w1,
                                                          const OptionalTensor& b1, const Tensor& w2,
                                                          const OptionalTensor& b2, double eps,
                                                          const OptionalTensor& scale, bool per_sample, bool save) {
  arguments::layer_norm_mlp(taken(), x, norm_weight, norm_bias, w1, b1, w2, b2, eps, scale, per_sample);
  const DeviceGuard guard(x.device());
  const std::int64_t rows = x.numel() / x.size(-1);
  const ScaleTensor factor(scale, per_sample, x);
  const Tensor hidden = empty({rows, w1.size(0)}, w1.scalar_type(), x);
  const Tensor mean = empty_f32({save ? rows : 0}, x), rstd = empty_f32({save ? rows : 0}, x);
  const Tensor pre = empty({save ? rows : 0, w1.size(0)}, w1.scalar_type(), x);
  layer_norm_linear_forward(x, norm_weight, norm_bias, w1, b1, eps, false, true, hidden, mean, rstd, pre);
  const Tensor out = empty(x.sizes(), c10::promoteTypes(x.scalar_type(), w2.scalar_type()), x);
  linear_forward(hidden, w2, b2, x, factor.scale, out);
  return {out, mean, rstd, pre};
}

std::vector<Tensor> layer_norm_mlp_backward(const Tensor& grad_out, const Tensor& x, const Tensor& norm_weight,
                                            const OptionalTensor& norm_bias, const Tensor& w1, const Tensor& w2,
                                            const OptionalTensor& b2, const OptionalTensor& scale, bool per_sample,
                                            const Tensor& mean, const Tensor& rstd, const Tensor& pre, NeedsList list) {
  const auto needs = arguments::layer_norm_mlp_backward(taken(), grad_out, x, norm_weight, norm_bias, w1, w2, b2, scale,
                                                        per_sample, mean, rstd, pre, list);
  const DeviceGuard guard(x.device());
  const ScaleTensor factor(scale, per_sample, x);
  const auto dtype = w2.scalar_type();
  const LayerNormLinearNeeds below{needs.x, needs.norm_weight, needs.norm_bias, needs.w1, needs.b1};
  const bool hidden_wanted = needs.w2 || needs.scale;
  const RowTensor grad = product_gradient(grad_out, factor.scale, {}, dtype);
  std::vector<Tensor> result;
  Tensor hidden;
  if (below.any()) {
    // The product's last step reads `pre` and makes gelu and its derivative of it, for all that follows.
    if (hidden_wanted) hidden = empty(pre.sizes(), dtype, pre);
    const RowTensor grad_pre(input_gradient(grad, w2, pre, hidden_wanted ? OptionalTensor(hidden) : OptionalTensor()));
    result = layer_norm_linear_gradients(grad_pre, x, norm_weight, norm_bias, w1, w1.scalar_type(), mean, rstd, false,
                                         below, grad_out);
  } else if (hidden_wanted) {
    hidden = at::gelu(pre);
  }
  parameter_gradients(grad, hidden, w2, dtype, needs.w2, needs.b2, result);
  if (needs.scale) result.push_back(scale_gradient(grad_out, hidden, w2, b2, *scale, factor.scale.kind));
  return result;
}

}  // namespace crossvit::cuda

TORCH_LIBRARY_FRAGMENT(crossvit_kernels_cuda, m) {
  crossvit::cuda::define(m, crossvit::schema::layer_norm_mlp, TORCH_FN(crossvit::cuda::layer_norm_mlp));
  crossvit::cuda::define(m, crossvit::schema::layer_norm_mlp_backward.cuda(),
                         TORCH_FN(crossvit::cuda::layer_norm_mlp_backward));
}
