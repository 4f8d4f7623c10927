// layer_norm_linear on a GPU: arguments, memory and the order of its launches.
#include "cuda/layer_norm_linear.h"

#include "cuda/linear_ops.h"

namespace crossvit::cuda {

namespace {

Norm norm_of(const NormParams& norm, double eps) {
  return {vector_of(norm.weight), vector_of(norm.bias), static_cast<float>(eps)};
}

}  // namespace

void layer_norm_linear_forward(const Call& call, const LayerNormLinear& a, const Tensor& out, const Tensor& mean,
                               const Tensor& rstd, const Tensor& pre) {
  const RowTensor in(a.x), matrix(a.linear.weight);
  LayerNormLinearArgs args{.dtype = dtype_of(matrix.dtype),
                           .tf32 = call.tf32,
                           .x = rows_of(in),
                           .weight = rows_of(matrix),
                           .rows = in.count,
                           .width = size_of(in.width),
                           .features = size_of(matrix.count),
                           .norm = norm_of(a.norm, a.eps),
                           .bias = vector_of(a.linear.bias),
                           .gelu_in = a.gelu_in,
                           .gelu_out = a.gelu_out,
                           .out = rows_of(out),
                           .pre = rows_of(pre),
                           .mean = float_data(mean),
                           .rstd = float_data(rstd)};
  Tensor normalized;
  if (layer_norm_linear_in_two(args)) {
    normalized = empty({in.count, in.width}, matrix.dtype, a.x);
    args.normalized = rows_of(normalized);
  }
  check(launch_layer_norm_linear(args, call.stream), "layer_norm_linear");
}

LayerNormLinear::Results layer_norm_linear(const LayerNormLinear& a, bool tf32) {
  const Call call(a.x, tf32);
  const Tensor& weight = a.linear.weight;
  const std::int64_t saved = a.save ? a.x.numel() / a.x.size(-1) : 0, features = weight.size(0);
  auto shape = a.x.sizes().vec();
  shape.back() = features;
  const Tensor out = empty(shape, weight.scalar_type(), a.x);
  const Tensor mean = empty_f32({saved}, a.x), rstd = empty_f32({saved}, a.x);
  const Tensor pre = empty({a.gelu_out ? saved : 0, features}, weight.scalar_type(), a.x);
  layer_norm_linear_forward(call, a, out, mean, rstd, pre);
  return {out, mean, rstd, pre};
}

std::vector<Tensor> layer_norm_linear_gradients(const Call& call, const RowTensor& grad, const Tensor& x,
                                                const NormParams& norm, const Tensor& weight, const Tensor& mean,
                                                const Tensor& rstd, bool gelu_in, const LayerNormLinearNeeds& needs,
                                                const Tensor& add) {
  const RowTensor in(x);
  const ScalarType dtype = weight.scalar_type();
  std::vector<Tensor> result;
  // What the weight's gradient multiplies is written once, rather than made again by each of its blocks.
  Tensor normalized;
  if (needs.weight) normalized = empty({in.count, in.width}, dtype, x);
  if (needs.below()) {
    const Tensor grad_normalized = input_gradient(call, grad, weight);
    const RowTensor added = add.defined() ? RowTensor(add.to(x.scalar_type())) : RowTensor();
    const auto target = [&](const Tensor& like, bool wanted) {
      return wanted ? target_of(result.emplace_back(empty(like.sizes(), like.scalar_type(), x))) : Target{};
    };
    Tensor partial;
    if (needs.norm_weight || needs.norm_bias)
      partial = empty_f32({layer_norm_backward_partial(in.count, size_of(in.width))}, x);
    const LayerNormBackwardArgs args{
        .dtype = dtype_of(weight),
        .grad = rows_of(grad_normalized),
        .x = rows_of(in),
        .add = rows_of(added),
        .rows = in.count,
        .width = size_of(in.width),
        .mean = mean.const_data_ptr<float>(),
        .rstd = rstd.const_data_ptr<float>(),
        .norm = norm_of(norm, 0),
        .gelu = gelu_in,
        .grad_x = needs.x ? rows_of(result.emplace_back(empty(x.sizes(), x.scalar_type(), x))) : Rows{},
        .y = rows_of(normalized),
        .grad_weight = target(norm.weight, needs.norm_weight),
        .grad_bias = target(norm.bias ? *norm.bias : norm.weight, needs.norm_bias),
        .partial = float_data(partial)};
    check(layer_norm_backward(args, call.stream), "layer_norm_linear_backward");
  } else if (needs.weight) {
    const LayerNormLinearArgs args{.dtype = dtype_of(weight),
                                   .x = rows_of(in),
                                   .rows = in.count,
                                   .width = size_of(in.width),
                                   .norm = norm_of(norm, 0),
                                   .gelu_in = gelu_in,
                                   .mean = float_data(mean),
                                   .rstd = float_data(rstd),
                                   .normalized = rows_of(normalized)};
    check(layer_norm_rows(args, /*given=*/true, call.stream), "layer_norm_linear_backward");
  }
  parameter_gradients(call, grad, normalized, weight, dtype, needs.weight, needs.bias, result);
  return result;
}

namespace {

std::vector<Tensor> layer_norm_linear_backward(const LayerNormLinearBackward& a, bool tf32) {
  const Call call(a.x, tf32);
  const RowTensor grad = product_gradient(call, a.grad_out, {}, a.pre, a.weight.scalar_type());
  return layer_norm_linear_gradients(call, grad, a.x, a.norm, a.weight, a.mean, a.rstd, a.gelu_in, a.needs, {});
}

const Library of_layer_norm_linear = ops().define<layer_norm_linear>().define<layer_norm_linear_backward>();

}  // namespace

}  // namespace crossvit::cuda
