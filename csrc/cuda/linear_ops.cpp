// The launches that ops with a Linear share, forward and backward.
#include "cuda/linear_ops.h"

#include "torch_c/aten.h"

namespace crossvit::cuda {

namespace {

LinearArgs product_of(const Call& call, const RowTensor& x, const RowTensor& weight, bool transposed,
                      const Epilogue& epilogue) {
  return {.dtype = dtype_of(weight.dtype),
          .tf32 = call.tf32,
          .transposed = transposed,
          .x = rows_of(x),
          .weight = rows_of(weight),
          .rows = x.count,
          .depth = size_of(transposed ? weight.count : weight.width),
          .columns = size_of(transposed ? weight.width : weight.count),
          .epilogue = epilogue};
}

}  // namespace

ScaleTensor::ScaleTensor(const ScaleParams& params, const Tensor& x) {
  if (!params.values) return;
  tensor = params.values->to(kFloat32).contiguous();
  scale.kind = params.per_sample ? Scale::sample : Scale::channel;
  scale.values = tensor.const_data_ptr<float>();
  scale.aligned = reinterpret_cast<std::uintptr_t>(scale.values) % 16 == 0;
  const std::int64_t rows = x.numel() / std::max<std::int64_t>(1, x.size(-1));
  require(rows < std::int64_t{1} << 32, "a scale for ", rows, " rows");
  scale.rows_per_sample =
      static_cast<std::uint32_t>(std::max<std::int64_t>(1, rows / std::max<std::int64_t>(1, x.size(0))));
}

void linear_forward(const Call& call, const Tensor& x, const LinearParams& linear, const Tensor& residual,
                    const Scale& scale, const Tensor& out) {
  const RowTensor in(x), matrix(linear.weight);
  const RowTensor base = residual.defined() ? RowTensor(residual.to(out.scalar_type())) : RowTensor();
  const Epilogue epilogue{
      .bias = vector_of(linear.bias), .scale = scale, .residual = rows_of(base), .out = rows_of(out)};
  check(cuda::linear(product_of(call, in, matrix, false, epilogue), call.stream), "linear_residual");
}

RowTensor product_gradient(const Call& call, const Tensor& grad_out, const Scale& scale, const Tensor& pre,
                           ScalarType dtype) {
  if (scale.kind == Scale::none && !pre.numel() && grad_out.scalar_type() == dtype) return RowTensor(grad_out);
  const RowTensor grad(grad_out.scalar_type() == dtype ? grad_out : grad_out.to(kFloat32));
  const RowTensor result(empty({grad.count, grad.width}, dtype, grad_out));
  const ScaledGradientArgs args{rows_of(grad), rows_of(pre), rows_of(result), scale, grad.count, size_of(grad.width)};
  check(scaled_gradient(args, call.stream), "linear_backward");
  return result;
}

Tensor input_gradient(const Call& call, const RowTensor& grad, const Tensor& weight, const Tensor& pre,
                      const Tensor& activated) {
  const RowTensor matrix(weight);
  const Tensor result = empty({grad.count, matrix.width}, weight.scalar_type(), weight);
  const Epilogue epilogue{.gelu_of = rows_of(pre), .activated = rows_of(activated), .out = rows_of(result)};
  check(linear(product_of(call, grad, matrix, true, epilogue), call.stream), "linear_backward");
  return result;
}

void parameter_gradients(const Call& call, const RowTensor& grad, const Tensor& x, const Tensor& weight,
                         ScalarType bias_dtype, bool weight_wanted, bool bias_wanted, std::vector<Tensor>& result) {
  if (!weight_wanted && !bias_wanted) return;
  const RowTensor in = weight_wanted ? RowTensor(x) : RowTensor();
  WeightGradientArgs args{.dtype = dtype_of(weight),
                          .tf32 = call.tf32,
                          .grad = rows_of(grad),
                          .x = rows_of(in),
                          .rows = grad.count,
                          .features = size_of(weight.size(0)),
                          .width = size_of(weight.size(1))};
  if (weight_wanted)
    args.grad_weight = rows_of(result.emplace_back(empty(weight.sizes(), weight.scalar_type(), weight)));
  if (bias_wanted) args.grad_bias = target_of(result.emplace_back(empty({weight.size(0)}, bias_dtype, weight)));
  Tensor partial;
  if (const std::int64_t size = weight_gradient_partial(args))
    args.partial = float_data(partial = empty_f32({size}, weight));
  check(weight_gradient(args, call.stream), "linear_backward");
}

Tensor scale_gradient(const Call& call, const Tensor& grad_out, const Tensor& x, const LinearParams& linear,
                      const ScaleParams& scale) {
  const Tensor product = empty_f32(grad_out.sizes(), grad_out);
  linear_forward(call, x, linear, {}, {}, product);
  const Tensor products = aten::mul(product, grad_out).contiguous();
  const Tensor result = scale.per_sample ? aten::sum(products.view({grad_out.size(0), -1}), {1})
                                         : aten::sum(products.view({-1, grad_out.size(-1)}), {0});
  return result.view(scale.values->sizes()).to(scale.values->scalar_type());
}

}  // namespace crossvit::cuda
