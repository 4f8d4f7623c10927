// What all Linears share: the product, and in backward passes the gradients of the input, the weight, the bias and the factor on the
// result.
#include "ops.h"
#include "torch_c/aten.h"

namespace crossvit {

void multiply(LinearArgs args, const RowTensor& x, const LinearParams& linear) {
  const WeightTensor matrix(linear.weight);
  args.x = rows_of(x);
  args.rows = x.count;
  args.in = x.width;
  args.out_features = linear.weight.size(0);
  args.weight = matrix.matrix;
  args.bias = vector_of(linear.bias);
  launch(active().linear, args);
}

WeightOperands::WeightOperands(const Tensor& weight, int64_t rows, int64_t out, int64_t in, bool left_wanted,
                               bool right_wanted) {
  const DType dtype = product_dtype(weight);
  const auto operand = [&](int64_t features) {
    return empty({active().operand_bytes(rows, features, dtype) / (dtype == DType::float32 ? 4 : 2)},
                 products_of(weight));
  };
  if (left_wanted) left = operand(out);
  if (right_wanted) right = operand(in);
}

WeightGradArgs weight_gradient_call(const WeightOperands& operands, int64_t rows, const Tensor& weight,
                                    ScalarType bias_dtype, bool wide, bool transposed, bool weight_wanted,
                                    bool bias_wanted, std::vector<Tensor>& result) {
  WeightGradArgs args{.left = data_of(operands.left),
                      .right = data_of(operands.right),
                      .rows = rows,
                      .out = weight.size(transposed ? 1 : 0),
                      .in = weight.size(transposed ? 0 : 1),
                      .products = product_dtype(weight),
                      .transposed = transposed};
  if (weight_wanted)
    args.grad_weight = rows_of(result.emplace_back(empty(weight.sizes(), wide ? kFloat32 : weight.scalar_type())));
  if (bias_wanted) {
    result.push_back(empty({weight.size(0)}, wide ? kFloat32 : bias_dtype));
    args.grad_bias = result.back().data_ptr();
    args.grad_bias_dtype = dtype_of(result.back());
  }
  return args;
}

std::vector<Tensor> linear_gradients(LinearGradArgs args, const Tensor& x, const Tensor& weight, const NormParams* norm,
                                     ScalarType bias_dtype, bool wide, const LayerNormLinearNeeds& needs) {
  args.in = weight.size(1);
  args.out_features = weight.size(0);
  args.products = product_dtype(weight);
  const WeightOperands operands(weight, args.rows, args.out_features, args.in, needs.weight || needs.bias,
                                needs.weight);
  args.left = data_of(operands.left);
  args.right = data_of(operands.right);
  const auto plan = active().linear_grad.plan(args, threads_here());
  const NormGradients of_norm(needs, plan.tasks, args.in, args);
  std::vector<Tensor> result;
  if (needs.x) args.grad_x = rows_of(result.emplace_back(empty(x.sizes(), x.scalar_type())));
  std::optional<WeightTensor> weight_t;
  if (needs.below()) args.weight_t = weight_t.emplace(transposed(weight)).matrix;
  launch(active().linear_grad, args, plan);
  if (norm) of_norm.append_to(result, *norm);
  if (needs.weight || needs.bias)
    launch(active().weight_grad, weight_gradient_call(operands, args.rows, weight, bias_dtype, wide, false,
                                                      needs.weight, needs.bias, result));
  return result;
}

Tensor input_gradient(const RowTensor& grad, Sizes shape, const Tensor& weight) {
  const WeightTensor weight_t = transposed(weight);
  const Tensor result = empty_f32(shape);
  launch(active().linear_grad, LinearGradArgs{.grad = rows_of(grad),
                                              .grad_x = rows_of(result),
                                              .rows = grad.count,
                                              .in = weight.size(1),
                                              .out_features = weight.size(0),
                                              .products = weight_t.matrix.dtype,
                                              .weight_t = weight_t.matrix});
  return result;
}

// d scale = sum of grad_out * Linear(x) over what the scale spans, without making Linear(x) again: per channel it is
// W . (grad_out^T x) + b . sum(grad_out), per sample x . (grad_out W) + grad_out . b,
// a long sum that cancels: in float64.
Tensor scale_gradient(const Tensor& grad_out, const Tensor& x, const LinearParams& linear, const ScaleParams& scale) {
  const auto& [weight, bias] = linear;
  const RowTensor grad(grad_out), in(x);
  Tensor result;
  if (scale.per_sample) {
    const auto of_samples = [&](const Tensor& products) {
      return aten::sum(products.contiguous().view({grad_out.size(0), -1}), {1});
    };
    result = of_samples(aten::mul(input_gradient(grad, x.sizes(), weight), x.to(kFloat64)));
    if (bias) result = aten::add(result, of_samples(aten::mul(grad_out.to(kFloat64), bias->to(kFloat64))));
  } else {
    const auto gradients =
        linear_gradients({.grad = rows_of(grad), .x = rows_of(in), .rows = in.count}, x, empty_f32(weight.sizes()),
                         nullptr, kFloat32, true, {.weight = true, .bias = true});
    result = aten::sum(aten::mul(gradients[0], weight.to(kFloat32)), {1});
    if (bias) result = aten::add(result, aten::mul(gradients[1], bias->to(kFloat32)));
  }
  return result.view(scale.values->sizes()).to(scale.values->scalar_type());
}

}  // namespace crossvit
