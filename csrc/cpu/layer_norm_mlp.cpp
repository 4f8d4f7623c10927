// layer_norm_mlp on the CPU: x + scale * Linear2(gelu(Linear1(LayerNorm(x)))) over row panels (mlp.h), and its gradients.
#include "ops.h"
#include "torch_c/aten.h"

namespace crossvit {

LayerNormMlp::Results layer_norm_mlp(const LayerNormMlp& a) {
  const RowTensor in(a.x);
  const WeightTensor w1(a.first.weight), w2(a.second.weight);
  const ScaleTensor factor(a.scale, a.x);
  const ScalarType dtype = a.second.weight.scalar_type();
  const int64_t saved = a.save ? in.count : 0, hidden = a.first.weight.size(0);
  const Tensor out = empty(a.x.sizes(), promoted(a.x.scalar_type(), dtype));
  const Tensor mean = empty_f32({saved}), rstd = empty_f32({saved}), pre = empty({saved, hidden}, dtype);
  launch(active().mlp, MlpArgs{.x = rows_of(in),
                               .out = rows_of(out),
                               .pre = rows_of(pre),
                               .rows = in.count,
                               .width = in.width,
                               .hidden = hidden,
                               .norm = norm_of(a.norm, a.eps, mean, rstd),
                               .w1 = w1.matrix,
                               .w2 = w2.matrix,
                               .b1 = vector_of(a.first.bias),
                               .b2 = vector_of(a.second.bias),
                               .scale = factor.scale});
  return {out, mean, rstd, pre};
}

namespace {

std::vector<Tensor> layer_norm_mlp_backward(const LayerNormMlpBackward& a, bool wide) {
  const auto& needs = a.needs;
  const Tensor &w1 = a.w1, &w2 = a.second.weight;
  const RowTensor grad(a.grad_out), in(a.x);
  const ScaleTensor factor(a.scale, a.x);
  const bool below = needs.x || needs.norm_weight || needs.norm_bias;
  const int64_t rows = in.count, width = in.width, hidden = w1.size(0);
  const WeightOperands w1_operands(w1, rows, hidden, width, needs.w1 || needs.b1, needs.w1);
  const WeightOperands w2_operands(w2, rows, hidden, width, needs.w2, needs.w2 || needs.b2);
  MlpGradArgs args{.grad = rows_of(grad),
                   .pre = rows_of(a.pre),
                   .x = rows_of(in),
                   .rows = rows,
                   .width = width,
                   .hidden = hidden,
                   .products = product_dtype(w1),
                   .norm = norm_of(a.norm, 0, a.mean, a.rstd),
                   .scale = factor.scale,
                   .left1 = data_of(w1_operands.left),
                   .right1 = data_of(w1_operands.right),
                   .left2 = data_of(w2_operands.left),
                   .right2 = data_of(w2_operands.right)};
  std::optional<WeightTensor> w1_t, w2_t;
  if (below) args.w1_t = w1_t.emplace(transposed(w1)).matrix;
  if (below || args.left1) args.w2_t = w2_t.emplace(transposed(w2)).matrix;
  const auto plan = active().mlp_grad.plan(args, threads_here());
  const NormGradients of_norm(needs, plan.tasks, width, args);
  std::vector<Tensor> result;
  if (needs.x) args.grad_x = rows_of(result.emplace_back(empty(a.x.sizes(), a.x.scalar_type())));
  if (below || args.left1 || args.right2) launch(active().mlp_grad, args, plan);
  of_norm.append_to(result, a.norm);
  std::vector<WeightGradArgs> calls;
  if (needs.w1 || needs.b1)
    calls.push_back(
        weight_gradient_call(w1_operands, rows, w1, w1.scalar_type(), wide, false, needs.w1, needs.b1, result));
  if (needs.w2 || needs.b2)
    calls.push_back(
        weight_gradient_call(w2_operands, rows, w2, w2.scalar_type(), wide, true, needs.w2, needs.b2, result));
  launch(active().weight_grad, calls);
  if (needs.scale) result.push_back(scale_gradient(a.grad_out, aten::gelu(a.pre.to(kFloat32)), a.second, a.scale));
  return result;
}

const Library of_layer_norm_mlp = ops().define<layer_norm_mlp>().define<layer_norm_mlp_backward>();

}  // namespace

}  // namespace crossvit
