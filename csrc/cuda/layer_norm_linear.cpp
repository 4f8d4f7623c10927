// layer_norm_linear on a GPU: arguments, memory and the order of its launches.
#include "cuda/layer_norm_linear.h"

#include "cuda/linear_ops.h"

namespace crossvit::cuda {

namespace {

Norm norm_of(const Tensor& weight, const OptionalTensor& bias, double eps) {
  return {vector_of(weight), vector_of(bias), static_cast<float>(eps)};
}

int width_of(std::int64_t size) {
  require(size < std::int64_t{1} << 30, "rows of ", size, " elements");
  return static_cast<int>(size);
}

}  // namespace

void layer_norm_linear_forward(const Call& call, const Tensor& x, const Tensor& norm_weight,
                               const OptionalTensor& norm_bias, const Tensor& weight, const OptionalTensor& bias,
                               double eps, bool gelu_in, bool gelu_out, const NormLinearResults& results) {
  const auto& [out, mean, rstd, pre] = results;
  const RowTensor in(x), matrix(weight), to(out);
  LayerNormLinearArgs args{};
  args.dtype = dtype_of(weight);
  args.tf32 = dtype_of(weight) == DType::float32 && call.tf32;
  args.x = rows_of(in);
  args.weight = rows_of(matrix);
  args.rows = in.count;
  args.width = width_of(in.width);
  args.features = width_of(matrix.count);
  args.norm = norm_of(norm_weight, norm_bias, eps);
  args.bias = vector_of(bias);
  args.gelu_in = gelu_in;
  args.gelu_out = gelu_out;
  args.out = rows_of(to);
  if (pre.numel()) args.pre = rows_of(RowTensor(pre));
  args.mean = float_data(mean);
  args.rstd = float_data(rstd);
  Tensor normalized;
  if (layer_norm_linear_in_two(args)) {
    normalized = empty({in.count, in.width}, weight.scalar_type(), x);
    args.normalized = rows_of(RowTensor(normalized));
  }
  check(launch_layer_norm_linear(args, call.stream), "layer_norm_linear");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_linear(const Tensor& x, const Tensor& norm_weight,
                                                             const OptionalTensor& norm_bias, const Tensor& weight,
                                                             const OptionalTensor& bias, double eps, bool gelu_in,
                                                             bool gelu_out, bool save, bool tf32) {
  arguments::layer_norm_linear(taken(), x, norm_weight, norm_bias, weight, bias, eps);
  const Call call(x, tf32);
  const std::int64_t rows = x.numel() / x.size(-1), features = weight.size(0);
  auto shape = x.sizes().vec();
  shape.back() = features;
  const Tensor out = empty(shape, weight.scalar_type(), x);
  const Tensor mean = empty_f32({save ? rows : 0}, x), rstd = empty_f32({save ? rows : 0}, x);
  const Tensor pre = empty({save && gelu_out ? rows : 0, features}, weight.scalar_type(), x);
  layer_norm_linear_forward(call, x, norm_weight, norm_bias, weight, bias, eps, gelu_in, gelu_out,
                            {out, mean, rstd, pre});
  return {out, mean, rstd, pre};
}

std::vector<Tensor> layer_norm_linear_gradients(const Call& call, const RowTensor& grad, const Tensor& x,
                                                const Tensor& norm_weight, const OptionalTensor& norm_bias,
                                                const Tensor& weight, ScalarType bias_dtype, const Tensor& mean,
                                                const Tensor& rstd, bool gelu_in, const LayerNormLinearNeeds& needs,
                                                const OptionalTensor& add) {
  const RowTensor in(x);
  std::vector<Tensor> result;
  // What the weight's gradient multiplies is written once, rather than made again by each of its blocks.
  Tensor normalized;
  if (needs.weight) normalized = empty({in.count, in.width}, weight.scalar_type(), x);
  if (needs.x || needs.norm_weight || needs.norm_bias) {
    const Tensor grad_normalized = input_gradient(call, grad, weight, {}, {});
    LayerNormBackwardArgs args{};
    args.dtype = dtype_of(weight);
    args.grad = rows_of(RowTensor(grad_normalized));
    args.x = rows_of(in);
    RowTensor added;
    if (add) {
      added = RowTensor(add->to(x.scalar_type()));
      args.add = rows_of(added);
    }
    args.rows = in.count;
    args.width = width_of(in.width);
    args.mean = mean.const_data_ptr<float>();
    args.rstd = rstd.const_data_ptr<float>();
    args.norm = norm_of(norm_weight, norm_bias, 0);
    args.gelu = gelu_in;
    if (needs.weight) args.y = rows_of(RowTensor(normalized));
    if (needs.x) {
      result.push_back(empty(x.sizes(), x.scalar_type(), x));
      args.grad_x = rows_of(RowTensor(result.back()));
    }
    if (needs.norm_weight) {
      result.push_back(empty({in.width}, norm_weight.scalar_type(), x));
      args.grad_weight = result.back().mutable_data_ptr();
      args.grad_weight_dtype = dtype_of(norm_weight);
    }
    if (needs.norm_bias) {
      result.push_back(empty({in.width}, norm_bias->scalar_type(), x));
      args.grad_bias = result.back().mutable_data_ptr();
      args.grad_bias_dtype = dtype_of(*norm_bias);
    }
    Tensor partial;
    if (needs.norm_weight || needs.norm_bias) {
      partial = empty_f32({layer_norm_backward_partial(args.rows, args.width)}, x);
      args.partial = float_data(partial);
    }
    check(layer_norm_backward(args, call.stream), "layer_norm_linear_backward");
  } else if (needs.weight) {
    LayerNormLinearArgs args{};
    args.dtype = dtype_of(weight);
    args.x = rows_of(in);
    args.rows = in.count;
    args.width = width_of(in.width);
    args.norm = norm_of(norm_weight, norm_bias, 0);
    args.gelu_in = gelu_in;
    args.mean = float_data(mean);
    args.rstd = float_data(rstd);
    args.normalized = rows_of(RowTensor(normalized));
    check(layer_norm_rows(args, /*given=*/true, call.stream), "layer_norm_linear_backward");
  }
  parameter_gradients(call, grad, normalized, weight, bias_dtype, needs.weight, needs.bias, result);
  return result;
}

std::vector<Tensor> layer_norm_linear_backward(const Tensor& grad_out, const Tensor& x, const Tensor& norm_weight,
                                               const OptionalTensor& norm_bias, const Tensor& weight,
                                               const Tensor& mean, const Tensor& rstd, const Tensor& pre, bool gelu_in,
                                               bool gelu_out, NeedsList list, bool tf32) {
  const auto needs = arguments::layer_norm_linear_backward(taken(), grad_out, x, norm_weight, norm_bias, weight, mean,
                                                           rstd, pre, gelu_out, list);
  const Call call(x, tf32);
  const RowTensor grad =
      product_gradient(call, grad_out, {}, gelu_out ? OptionalTensor(pre) : OptionalTensor(), weight.scalar_type());
  return layer_norm_linear_gradients(call, grad, x, norm_weight, norm_bias, weight, weight.scalar_type(), mean, rstd,
                                     gelu_in, needs, {});
}

const Library of_layer_norm_linear = ops()
                                         .define<layer_norm_linear>(schema::layer_norm_linear.cuda())
                                         .define<layer_norm_linear_backward>(schema::layer_norm_linear_backward.cuda());

}  // namespace crossvit::cuda
