// What the backward passes of all Linears share: the gradients of the input, the weight, the bias and the factor on the result.
#include "launch.h"
#include "ops.h"
#include "torch_c/aten.h"

namespace crossvit {

WeightOperands::WeightOperands(const Tensor& weight, int64_t rows, int64_t out, int64_t in, bool left_wanted,
                               bool right_wanted) {
  const auto products = products_of(weight);
  const DType dtype = products == kFloat32 ? DType::float32 : DType::bfloat16;
  const auto operand = [&](int64_t features) {
    return empty({active().operand_bytes(rows, features, dtype) / (dtype == DType::float32 ? 4 : 2)}, products);
  };
  if (left_wanted) left = operand(out);
  if (right_wanted) right = operand(in);
}

WeightGradArgs weight_gradient_call(const WeightOperands& operands, int64_t rows, const Tensor& weight,
                                    ScalarType bias_dtype, bool wide, bool transposed, bool weight_wanted,
                                    bool bias_wanted, std::vector<Tensor>& result) {
  WeightGradArgs args{};
  args.left = operands.left_data();
  args.right = operands.right_data();
  args.rows = rows;
  args.out = weight.size(transposed ? 1 : 0);
  args.in = weight.size(transposed ? 0 : 1);
  args.products = products_of(weight) == kFloat32 ? DType::float32 : DType::bfloat16;
  args.transposed = transposed;
  if (weight_wanted) {
    result.push_back(empty(weight.sizes(), wide ? kFloat32 : weight.scalar_type()));
    args.grad_weight = rows_of(RowTensor(result.back()));
  }
  if (bias_wanted) {
    result.push_back(empty({weight.size(0)}, wide ? kFloat32 : bias_dtype));
    args.grad_bias = result.back().data_ptr();
    args.grad_bias_dtype = dtype_of(result.back());
  }
  return args;
}

std::vector<Tensor> linear_gradients(LinearGradArgs& args, const Tensor& x, const Tensor& weight,
                                     const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                     ScalarType bias_dtype, bool wide, const LayerNormLinearNeeds& needs) {
  args.in = weight.size(1);
  args.out_features = weight.size(0);
  args.products = products_of(weight) == kFloat32 ? DType::float32 : DType::bfloat16;
  const WeightOperands operands(weight, args.rows, args.out_features, args.in, needs.weight || needs.bias,
                                needs.weight);
  args.left = operands.left_data();
  args.right = operands.right_data();
  const auto plan = active().linear_grad.plan(args, threads_here());
  const NormGradients partial(needs.norm_weight, needs.norm_bias, plan.tasks, args.in, weight);
  args.grad_norm_weight = needs.norm_weight ? float_data(partial.weight) : nullptr;
  args.grad_norm_bias = needs.norm_bias ? float_data(partial.bias) : nullptr;
  std::vector<Tensor> result;
  if (needs.x) {
    result.push_back(empty(x.sizes(), x.scalar_type()));
    args.grad_x = rows_of(RowTensor(result.back()));
  }
  std::optional<WeightTensor> weight_t;
  if (needs.x || needs.norm_weight || needs.norm_bias) {
    weight_t.emplace(transposed(weight));
    args.weight_t = weight_t->matrix;
  }
  launch(active().linear_grad, args, plan);
  if (needs.norm_weight) result.push_back(total(partial.weight, *norm_weight));
  if (needs.norm_bias) result.push_back(total(partial.bias, norm_bias ? *norm_bias : *norm_weight));
  if (needs.weight || needs.bias) {
    auto call =
        weight_gradient_call(operands, args.rows, weight, bias_dtype, wide, false, needs.weight, needs.bias, result);
    launch(active().weight_grad, call);
  }
  return result;
}

Tensor input_gradient(const RowTensor& grad, Sizes shape, const Tensor& weight) {
  const WeightTensor weight_t = transposed(weight);
  const Tensor result = empty_f32(shape);
  LinearGradArgs args{};
  args.grad = rows_of(grad);
  args.grad_x = rows_of(RowTensor(result));
  args.rows = grad.count;
  args.in = weight.size(1);
  args.out_features = weight.size(0);
  args.products = weight_t.matrix.dtype;
  args.weight_t = weight_t.matrix;
  launch(active().linear_grad, args);
  return result;
}

// d scale = sum of grad_out * Linear(x) over what the scale spans, without making Linear(x) again: per channel it is
// W . (grad_out^T x) + b . sum(grad_out), per sample x . (grad_out W) + grad_out . b,
// a long sum that cancels: in float64.
Tensor scale_gradient(const Tensor& grad_out, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      const Tensor& scale, const Tensor& unscaled, Scale::Kind kind) {
  Tensor result;
  if (kind == Scale::channel) {
    const RowTensor grad(grad_out), in(x);
    LinearGradArgs args{};
    args.grad = rows_of(grad);
    args.x = rows_of(in);
    args.rows = in.count;
    const Tensor like = empty_f32({weight.size(0), weight.size(1)});
    const auto gradients = linear_gradients(args, x, like, {}, {}, kFloat32, true, {.weight = true, .bias = true});
    result = aten::sum(aten::mul(gradients[0], weight.to(kFloat32)), {1});
    if (bias) result = aten::add(result, aten::mul(gradients[1], bias->to(kFloat32)));
  } else {
    const auto of_samples = [&](const Tensor& products) {
      return aten::sum(products.contiguous().view({grad_out.size(0), -1}), {1});
    };
    result = of_samples(aten::mul(unscaled, x.to(kFloat64)));
    if (bias) result = aten::add(result, of_samples(aten::mul(grad_out.to(kFloat64), bias->to(kFloat64))));
  }
  return result.view(scale.sizes()).to(scale.scalar_type());
}

}  // namespace crossvit
