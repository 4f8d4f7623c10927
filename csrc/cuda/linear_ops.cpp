// The launches that ops with a Linear share, forward and backward.
#include "cuda/linear_ops.h"

#include "torch_c/aten.h"

namespace crossvit::cuda {

namespace {

int size_of(std::int64_t size) {
  require(size < std::int64_t{1} << 30, "rows of ", size, " elements");
  return static_cast<int>(size);
}

LinearArgs product_of(const Call& call, const RowTensor& x, const RowTensor& weight, bool transposed) {
  LinearArgs args{};
  args.dtype = dtype_of(weight.dtype);
  args.tf32 = dtype_of(weight.dtype) == DType::float32 && call.tf32;
  args.transposed = transposed;
  args.x = rows_of(x);
  args.weight = rows_of(weight);
  args.rows = x.count;
  args.depth = size_of(transposed ? weight.count : weight.width);
  args.columns = size_of(transposed ? weight.width : weight.count);
  return args;
}

}  // namespace

ScaleTensor::ScaleTensor(const OptionalTensor& t, bool per_sample, const Tensor& x) {
  if (!t) return;
  tensor = t->to(kFloat32).contiguous();
  scale.kind = per_sample ? Scale::sample : Scale::channel;
  scale.values = tensor.const_data_ptr<float>();
  scale.aligned = reinterpret_cast<std::uintptr_t>(scale.values) % 16 == 0;
  const std::int64_t rows = x.numel() / std::max<std::int64_t>(1, x.size(-1));
  require(rows < std::int64_t{1} << 32, "a scale for ", rows, " rows");
  scale.rows_per_sample =
      static_cast<std::uint32_t>(std::max<std::int64_t>(1, rows / std::max<std::int64_t>(1, x.size(0))));
}

void linear_forward(const Call& call, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                    const OptionalTensor& residual, const Scale& scale, const Tensor& out) {
  const RowTensor in(x), matrix(weight), to(out);
  LinearArgs args = product_of(call, in, matrix, false);
  RowTensor base;
  if (residual) {
    base = RowTensor(residual->to(out.scalar_type()));
    args.epilogue.residual = rows_of(base);
  }
  args.epilogue.bias = vector_of(bias);
  args.epilogue.scale = scale;
  args.epilogue.out = rows_of(to);
  check(linear(args, call.stream), "linear_residual");
}

RowTensor product_gradient(const Call& call, const Tensor& grad_out, const Scale& scale, const OptionalTensor& pre,
                           ScalarType dtype) {
  if (scale.kind == Scale::none && !pre && grad_out.scalar_type() == dtype) return RowTensor(grad_out);
  const RowTensor grad(grad_out.scalar_type() == dtype ? grad_out : grad_out.to(kFloat32));
  const RowTensor result(empty({grad.count, grad.width}, dtype, grad_out));
  ScaledGradientArgs args{};
  args.grad = rows_of(grad);
  RowTensor before;
  if (pre) {
    before = RowTensor(*pre);
    args.pre = rows_of(before);
  }
  args.out = rows_of(result);
  args.scale = scale;
  args.rows = grad.count;
  args.columns = size_of(grad.width);
  check(scaled_gradient(args, call.stream), "linear_backward");
  return result;
}

Tensor input_gradient(const Call& call, const RowTensor& grad, const Tensor& weight, const OptionalTensor& pre,
                      const OptionalTensor& activated) {
  const RowTensor matrix(weight);
  const Tensor result = empty({grad.count, matrix.width}, weight.scalar_type(), weight);
  LinearArgs args = product_of(call, grad, matrix, true);
  RowTensor before;
  if (pre) {
    before = RowTensor(*pre);
    args.epilogue.gelu_of = rows_of(before);
  }
  if (activated) args.epilogue.activated = rows_of(RowTensor(*activated));
  args.epilogue.out = rows_of(RowTensor(result));
  check(linear(args, call.stream), "linear_backward");
  return result;
}

void parameter_gradients(const Call& call, const RowTensor& grad, const Tensor& x, const Tensor& weight,
                         ScalarType bias_dtype, bool weight_wanted, bool bias_wanted, std::vector<Tensor>& result) {
  if (!weight_wanted && !bias_wanted) return;
  WeightGradientArgs args{};
  args.dtype = dtype_of(weight);
  args.tf32 = args.dtype == DType::float32 && call.tf32;
  args.grad = rows_of(grad);
  args.rows = grad.count;
  args.features = size_of(weight.size(0));
  args.width = size_of(weight.size(1));
  RowTensor in;
  if (weight_wanted) {
    in = RowTensor(x);
    args.x = rows_of(in);
    result.push_back(empty(weight.sizes(), weight.scalar_type(), weight));
    args.grad_weight = rows_of(RowTensor(result.back()));
  }
  if (bias_wanted) {
    result.push_back(empty({weight.size(0)}, bias_dtype, weight));
    args.grad_bias = result.back().mutable_data_ptr();
    args.bias_dtype = dtype_of(result.back());
  }
  Tensor partial;
  if (const std::int64_t size = weight_gradient_partial(args)) {
    partial = empty_f32({size}, weight);
    args.partial = partial.mutable_data_ptr<float>();
  }
  check(weight_gradient(args, call.stream), "linear_backward");
}

Tensor scale_gradient(const Call& call, const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                      const OptionalTensor& bias, const Tensor& scale, Scale::Kind kind) {
  const Tensor product = empty_f32(grad_out.sizes(), grad_out);
  linear_forward(call, x, weight, bias, {}, {}, product);
  const Tensor products = aten::mul(product, grad_out).contiguous();
  const Tensor result = kind == Scale::channel ? aten::sum(products.view({-1, grad_out.size(-1)}), {0})
                                               : aten::sum(products.view({grad_out.size(0), -1}), {1});
  return result.view(scale.sizes()).to(scale.scalar_type());
}

}  // namespace crossvit::cuda
