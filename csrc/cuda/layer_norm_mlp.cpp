// layer_norm_mlp on a GPU: layer_norm_linear with gelu, then linear_residual onto the op's own input.

#include "cuda/linear_ops.h"
#include "torch_c/aten.h"

namespace crossvit::cuda {

namespace {

LayerNormMlp::Results layer_norm_mlp(const LayerNormMlp& a, bool tf32) {
  const Call call(a.x, tf32);
  const std::int64_t rows = a.x.numel() / a.x.size(-1), saved = a.save ? rows : 0, features = a.first.weight.size(0);
  const ScalarType dtype = a.first.weight.scalar_type();
  const ScaleTensor factor(a.scale, a.x);
  const Tensor hidden = empty({rows, features}, dtype, a.x), pre = empty({saved, features}, dtype, a.x);
  const Tensor mean = empty_f32({saved}, a.x), rstd = empty_f32({saved}, a.x);
  layer_norm_linear_forward(call, {a.x, a.norm, a.first, a.eps, false, true, a.save}, hidden, mean, rstd, pre);
  const Tensor out = empty(a.x.sizes(), promoted(a.x.scalar_type(), dtype), a.x);
  linear_forward(call, hidden, a.second, a.x, factor.scale, out);
  return {out, mean, rstd, pre};
}

std::vector<Tensor> layer_norm_mlp_backward(const LayerNormMlpBackward& a, bool tf32) {
  const Call call(a.x, tf32);
  const auto& needs = a.needs;
  const ScaleTensor factor(a.scale, a.x);
  const Tensor& w2 = a.second.weight;
  const auto dtype = w2.scalar_type();
  const LayerNormLinearNeeds of_first{needs.x, needs.norm_weight, needs.norm_bias, needs.w1, needs.b1};
  const bool hidden_wanted = needs.w2 || needs.scale;
  const RowTensor grad = product_gradient(call, a.grad_out, factor.scale, {}, dtype);
  std::vector<Tensor> result;
  Tensor hidden;
  if (of_first.below() || of_first.weight || of_first.bias) {
    // The product's last step reads `pre` and makes gelu and its derivative of it, for all that follows.
    if (hidden_wanted) hidden = empty(a.pre.sizes(), dtype, a.pre);
    const RowTensor grad_pre(input_gradient(call, grad, w2, a.pre, hidden));
    result =
        layer_norm_linear_gradients(call, grad_pre, a.x, a.norm, a.w1, a.mean, a.rstd, false, of_first, a.grad_out);
  } else if (hidden_wanted) {
    hidden = aten::gelu(a.pre);
  }
  parameter_gradients(call, grad, hidden, w2, dtype, needs.w2, needs.b2, result);
  if (needs.scale) result.push_back(scale_gradient(call, a.grad_out, hidden, a.second, a.scale));
  return result;
}

const Library of_layer_norm_mlp = ops().define<layer_norm_mlp>().define<layer_norm_mlp_backward>();

}  // namespace

}  // namespace crossvit::cuda
