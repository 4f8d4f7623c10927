// cls_cross_attention on the CPU: the absorbed form over one pass of the tokens (token_pass.h), its gradient in one
// more (token_gradient.h), and cls_fusion, which strings a direction of CrossViT's fusion together for inference.
#include "launch.h"
#include "ops.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>

namespace crossvit {

namespace {

// y = [residual +] Linear(pre_act(norm(x))) over the rows of x, for the few rows of a batch of CLS tokens.
Tensor linear_rows(const Tensor& x, const Norm& norm, bool gelu_in, const Tensor& weight, const OptionalTensor& bias,
                   const Tensor& residual, at::ScalarType dtype) {
  const RowTensor in(x);
  const WeightTensor matrix(weight);
  const Tensor out = empty_like_dtype({x.size(0), weight.size(0)}, dtype);
  LinearArgs args{};
  args.x = in.rows;
  args.out = RowTensor(out).rows;
  if (residual.defined()) args.residual = RowTensor(residual).rows;
  args.rows = in.count;
  args.in = x.size(-1);
  args.out_features = weight.size(0);
  args.norm = norm;
  args.gelu_in = gelu_in;
  args.weight = matrix.matrix;
  args.bias = vector_of(bias);
  launch(active().linear, args);
  return out;
}

// W_h^T rows_h * scale for every head: (batch, heads * d) -> (batch, heads, width).
Tensor absorb(const Tensor& rows, const Tensor& weight, int64_t num_heads, double scale) {
  const WeightTensor matrix(weight);
  const Tensor result = empty_f32({rows.size(0), num_heads, weight.size(1)});
  AbsorbArgs args{rows.const_data_ptr<float>(), matrix.matrix,  float_data(result),       rows.size(0), num_heads,
                  weight.size(0) / num_heads,   weight.size(1), static_cast<float>(scale)};
  launch(active().absorb, args);
  return result;
}

// (W_h (gamma . rows_h + beta) + bias) * scale for every head: (batch, heads, width) -> (batch, heads * d).
Tensor project_heads(const Tensor& rows, const Tensor& weight, Vector gamma, Vector beta, Vector bias, double scale,
                     at::ScalarType dtype) {
  const WeightTensor matrix(weight);
  const int64_t batch = rows.size(0), num_heads = rows.size(1);
  const Tensor out = empty_like_dtype({batch, weight.size(0)}, dtype);
  ProjectHeadsArgs args{};
  args.rows = rows.const_data_ptr<float>();
  args.weight = matrix.matrix;
  args.gamma = gamma;
  args.beta = beta;
  args.bias = bias;
  args.out = RowTensor(out).rows;
  args.batch = batch;
  args.heads = num_heads;
  args.head_width = weight.size(0) / num_heads;
  args.width = weight.size(1);
  args.scale = static_cast<float>(scale);
  launch(active().project_heads, args);
  return out;
}

// Patches as the token pass walks them: (batch, tokens, width) with the width contiguous.
Tensor dense_tokens(const Tensor& patches) {
  return patches.stride(2) == 1 || patches.size(2) <= 1 ? patches : patches.contiguous();
}
Rows token_rows(const Tensor& patches) {
  return {const_cast<void*>(patches.const_data_ptr()), dtype_of(patches), patches.size(1), patches.stride(0),
          patches.stride(1)};
}

// What the pass over the tokens and its gradient are both told.
template <class Args>
Args token_args(const RowTensor& cls, const Tensor& patches, int64_t num_heads, const Norm& norm, const Tensor& mean,
                const Tensor& rstd, const Tensor& key_query) {
  Args args{};
  args.cls = cls.rows;
  args.patches = token_rows(patches);
  args.batch = patches.size(0);
  args.tokens = patches.size(1);
  args.width = patches.size(2);
  args.heads = num_heads;
  args.norm = norm;
  args.norm.mean = float_data(mean);
  args.norm.rstd = float_data(rstd);
  args.key_query = float_data(key_query);
  return args;
}

// cls_cross_attention, of arguments that have been looked at.
CrossAttentionResult attend(const Tensor& cls, const Tensor& patches, const Tensor& norm_weight,
                            const OptionalTensor& norm_bias, const Tensor& q_weight, const OptionalTensor& q_bias,
                            const Tensor& k_weight, const Tensor& v_weight, const OptionalTensor& v_bias,
                            int64_t num_heads, double eps, bool save) {
  const int64_t batch = patches.size(0), tokens = patches.size(1), width = patches.size(2);
  const Norm norm = norm_of(norm_weight, norm_bias, eps);
  const Tensor query = linear_rows(cls, norm, false, q_weight, q_bias, {}, at::kFloat);
  const Tensor key_query = absorb(query, k_weight, num_heads, 1.0 / std::sqrt(static_cast<double>(width / num_heads)));

  const Tensor dense = dense_tokens(patches);
  const RowTensor first(cls);
  const int64_t saved = save ? batch : 0;
  const Tensor mean = empty_f32({saved, 1 + tokens}), rstd = empty_f32({saved, 1 + tokens});
  const Tensor probs = empty_f32({saved, num_heads, 1 + tokens}), context = empty_f32({batch, num_heads, width});
  auto args = token_args<TokenPassArgs>(first, dense, num_heads, norm, mean, rstd, key_query);
  args.probs = float_data(probs);
  args.context = float_data(context);
  const int64_t tasks = active().token_pass.tasks(args, threads_here());
  Tensor partial;
  if (args.splits > 1) {
    partial = empty_f32({tasks, num_heads, width + 2});
    args.partial = float_data(partial);
  }
  launch(active().token_pass, args);
  if (args.splits > 1) launch(active().join_splits, args);

  const Tensor out =
      project_heads(context, v_weight, norm.weight, norm.bias, vector_of(v_bias), 1.0, q_weight.scalar_type());
  const auto kept = [&](const Tensor& t) {
    auto shape = t.sizes().vec();
    if (!save) shape[0] = 0;
    return save ? t : empty_f32(shape);
  };
  return {out, mean, rstd, probs, kept(context), kept(query), kept(key_query)};
}

}  // namespace

CrossAttentionResult cls_cross_attention(const Tensor& cls, const Tensor& patches, const Tensor& norm_weight,
                                         const OptionalTensor& norm_bias, const Tensor& q_weight,
                                         const OptionalTensor& q_bias, const Tensor& k_weight, const Tensor& v_weight,
                                         const OptionalTensor& v_bias, int64_t num_heads, double eps, bool save) {
  arguments::cls_cross_attention(kTaken, cls, patches, norm_weight, norm_bias, q_weight, q_bias, k_weight, v_weight,
                                 v_bias, num_heads, eps);
  return attend(cls, patches, norm_weight, norm_bias, q_weight, q_bias, k_weight, v_weight, v_bias, num_heads, eps,
                save);
}

std::vector<Tensor> cls_cross_attention_backward(const Tensor& grad_out, const Tensor& cls, const Tensor& patches,
                                                 const Tensor& norm_weight, const OptionalTensor& norm_bias,
                                                 const Tensor& q_weight, const Tensor& k_weight, const Tensor& v_weight,
                                                 const Tensor& mean, const Tensor& rstd, const Tensor& probs,
                                                 const Tensor& context, const Tensor& query, const Tensor& key_query,
                                                 int64_t num_heads, Needs needs, bool wide) {
  arguments::cls_cross_attention_backward(kTaken, grad_out, cls, patches, norm_weight, norm_bias, q_weight, k_weight,
                                          v_weight, mean, rstd, probs, context, query, key_query, num_heads, needs);
  const int64_t batch = patches.size(0), tokens = patches.size(1), width = patches.size(2), d = width / num_heads;
  const double scale = 1.0 / std::sqrt(static_cast<double>(d));
  const Tensor gamma = norm_weight.to(at::kFloat);
  const Tensor beta = norm_bias ? norm_bias->to(at::kFloat) : at::zeros_like(gamma);
  const Tensor grad = grad_out.to(at::kFloat).contiguous();
  const Norm norm = norm_of(norm_weight, norm_bias, 0);

  // Values: g_h = W_v,h^T dout_h is the gradient of y_h = gamma . z_h + beta.
  const Tensor grad_value = absorb(grad, v_weight, num_heads, 1.0);
  const Tensor grad_context = grad_value.mul(gamma);

  const Tensor dense = dense_tokens(patches);
  const RowTensor first(cls);
  const Tensor grad_patches = needs.get(1) ? at::empty({batch, tokens, width}, patches.options()) : Tensor();
  const Tensor grad_normalized = empty_f32({batch, width}), grad_u = empty_f32({batch, num_heads, width});
  auto args = token_args<TokenGradientArgs>(first, dense, num_heads, norm, mean, rstd, key_query);
  if (needs.get(1)) args.grad_patches = token_rows(grad_patches);
  args.probs = float_data(probs);
  args.context = float_data(context);
  args.grad_context = float_data(grad_context);
  args.grad_normalized = float_data(grad_normalized);
  args.grad_u = float_data(grad_u);
  launch(active().token_gradient, args);

  // Keys and query: u_h = gamma . a_h, a_h = W_k,h^T q_h scale. What follows has one row per image.
  const Tensor grad_key_query = grad_u.mul(gamma);
  const Tensor grad_query = project_heads(grad_key_query, k_weight, {}, {}, {}, scale, at::kFloat);
  const Tensor normalized = cls.to(at::kFloat).sub(mean.select(1, 0).unsqueeze(1)).mul(rstd.select(1, 0).unsqueeze(1));
  const Tensor grad_query_input = at::mm(grad_query, q_weight.to(at::kFloat));

  std::vector<Tensor> result;
  if (needs.get(0)) {
    const Tensor g = grad_normalized.add(grad_query_input.mul(gamma));
    const Tensor along = g.mul(normalized).mean(1, true);
    result.push_back(
        g.sub(g.mean(1, true)).sub(normalized.mul(along)).mul(rstd.select(1, 0).unsqueeze(1)).to(cls.scalar_type()));
  }
  if (needs.get(1)) result.push_back(grad_patches);
  if (needs.get(2))
    result.push_back(grad_value.to(at::kDouble)
                         .mul(context)
                         .add(grad_u.to(at::kDouble).mul(key_query))
                         .sum(at::IntArrayRef{0, 1})
                         .add(grad_query_input.mul(normalized).sum(0))
                         .to(norm_weight.scalar_type()));
  if (needs.get(3))
    result.push_back(grad_value.sum(at::IntArrayRef{0, 1}).add(grad_query_input.sum(0)).to(norm_bias->scalar_type()));
  const auto weight_dtype = wide ? at::kFloat : q_weight.scalar_type();
  if (needs.get(4)) result.push_back(at::mm(grad_query.t(), normalized.mul(gamma).add(beta)).to(weight_dtype));
  if (needs.get(5)) result.push_back(grad_query.sum(0).to(weight_dtype));
  // (heads, d, batch) x (heads, batch, width): the outer products of every head, summed over the batch.
  const auto outer = [&](const Tensor& rows, const Tensor& wide) {
    return at::bmm(rows.view({batch, num_heads, d}).permute({1, 2, 0}), wide.transpose(0, 1))
        .reshape({width, width})
        .to(weight_dtype);
  };
  if (needs.get(6)) result.push_back(outer(query.mul(scale), grad_key_query));
  if (needs.get(7)) result.push_back(at::zeros({width}, k_weight.options().dtype(weight_dtype)));
  if (needs.get(8)) result.push_back(outer(grad, context.mul(gamma).add(beta)));
  // The probabilities sum to one, unless they are not numbers, which the bias's gradient then must not be either.
  if (needs.get(9))
    result.push_back(
        grad.view({batch, num_heads, d}).add(probs.sum(2, true).mul(0)).sum(0).reshape({width}).to(weight_dtype));
  return result;
}

Tensor cls_fusion(const Tensor& cls, const Tensor& patches, const Tensor& proj_norm_weight,
                  const OptionalTensor& proj_norm_bias, const Tensor& proj_weight, const OptionalTensor& proj_bias,
                  const Tensor& norm_weight, const OptionalTensor& norm_bias, const Tensor& q_weight,
                  const OptionalTensor& q_bias, const Tensor& k_weight, const Tensor& v_weight,
                  const OptionalTensor& v_bias, const Tensor& out_weight, const OptionalTensor& out_bias,
                  const Tensor& revert_norm_weight, const OptionalTensor& revert_norm_bias, const Tensor& revert_weight,
                  const OptionalTensor& revert_bias, int64_t num_heads, double eps) {
  arguments::cls_fusion(kTaken, cls, patches, proj_norm_weight, proj_norm_bias, proj_weight, proj_bias, norm_weight,
                        norm_bias, q_weight, q_bias, k_weight, v_weight, v_bias, out_weight, out_bias,
                        revert_norm_weight, revert_norm_bias, revert_weight, revert_bias, num_heads, eps);
  // Between the ops the CLS stays in float32, whatever the model's dtype.
  const Tensor projected =
      linear_rows(cls, norm_of(proj_norm_weight, proj_norm_bias, eps), true, proj_weight, proj_bias, {}, at::kFloat);
  const Tensor attended = std::get<0>(attend(projected, patches, norm_weight, norm_bias, q_weight, q_bias, k_weight,
                                             v_weight, v_bias, num_heads, eps, false));
  const Tensor fused = linear_rows(attended, Norm{}, false, out_weight, out_bias, projected, at::kFloat);
  return linear_rows(fused, norm_of(revert_norm_weight, revert_norm_bias, eps), true, revert_weight, revert_bias, {},
                     revert_weight.scalar_type());
}

}  // namespace crossvit
