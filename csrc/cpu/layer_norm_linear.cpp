// layer_norm_linear on the CPU: act(Linear(pre_act(LayerNorm(x)))) over row panels (linear.h), and its gradients (grad.h).
#include "ops.h"

namespace crossvit {

LayerNormLinear::Results layer_norm_linear(const LayerNormLinear& a) {
  const RowTensor in(a.x);
  const Tensor& weight = a.linear.weight;
  const int64_t saved = a.save ? in.count : 0;
  auto shape = a.x.sizes().vec();
  shape.back() = weight.size(0);
  const Tensor out = empty(shape, weight.scalar_type()), mean = empty_f32({saved}), rstd = empty_f32({saved});
  const Tensor pre = empty({a.gelu_out ? saved : 0, weight.size(0)}, weight.scalar_type());
  multiply({.out = rows_of(out),
            .pre = rows_of(pre),
            .norm = norm_of(a.norm, a.eps, mean, rstd),
            .gelu_in = a.gelu_in,
            .gelu_out = a.gelu_out},
           in, a.linear);
  return {out, mean, rstd, pre};
}

namespace {

std::vector<Tensor> layer_norm_linear_backward(const LayerNormLinearBackward& a, bool wide) {
  const RowTensor grad(a.grad_out), in(a.x);
  return linear_gradients({.grad = rows_of(grad),
                           .pre = rows_of(a.pre),
                           .x = rows_of(in),
                           .rows = in.count,
                           .norm = norm_of(a.norm, 0, a.mean, a.rstd),
                           .gelu_in = a.gelu_in,
                           .gelu_out = a.gelu_out},
                          a.x, a.weight, &a.norm, a.weight.scalar_type(), wide, a.needs);
}

const Library of_layer_norm_linear = ops().define<layer_norm_linear>().define<layer_norm_linear_backward>();

}  // namespace

}  // namespace crossvit
