// cls_cross_attention on the CPU: the steps of docs/design/cls_cross_attention.md, each a function of its name. Their kernels are
// in token_pass.h, token_gradient.h and heads.h.
#include "ops.h"
#include "torch_c/aten.h"

#include <cmath>
#include <limits>

namespace crossvit {

namespace {

double score_scale(int64_t head_width) { return 1.0 / std::sqrt(static_cast<double>(head_width)); }

// W_h^T rows_h * scale for every head: (batch, heads * d) -> (batch, heads, width).
Tensor absorb(const Tensor& rows, const Tensor& weight, int64_t num_heads, double scale) {
  const WeightTensor matrix(weight);
  const Tensor result = empty_f32({rows.size(0), num_heads, weight.size(1)});
  launch(active().absorb, AbsorbArgs{rows.const_data_ptr<float>(), matrix.matrix, float_data(result), rows.size(0),
                                     num_heads, weight.size(0) / num_heads, weight.size(1), static_cast<float>(scale)});
  return result;
}

// (W_h (gamma . rows_h + beta) + bias) * scale for every head: (batch, heads, width) -> (batch, heads * d).
Tensor project_heads(const Tensor& rows, const Tensor& weight, Vector gamma, Vector beta, Vector bias, double scale,
                     ScalarType dtype) {
  const WeightTensor matrix(weight);
  const int64_t batch = rows.size(0), num_heads = rows.size(1);
  const Tensor out = empty({batch, weight.size(0)}, dtype);
  launch(active().project_heads,
         ProjectHeadsArgs{rows.const_data_ptr<float>(), matrix.matrix, gamma, beta, bias, rows_of(out), batch,
                          num_heads, weight.size(0) / num_heads, weight.size(1), static_cast<float>(scale)});
  return out;
}

// Patches as the passes over the tokens walk them, their width contiguous.
Rows token_rows(const Tensor& patches) {
  return {patches.data_ptr(), dtype_of(patches), patches.size(1), patches.stride(0), patches.stride(1)};
}

// --- forward -------------------------------------------------------------------------------------------------------------

struct ClsQuery {
  Tensor query, key_query;  // (batch, width), (batch, heads, width)
};
ClsQuery cls_query(const ClsCrossAttention& a) {
  const Tensor query = empty_f32(a.cls.sizes());
  multiply({.out = rows_of(query), .norm = norm_of(a.norm, a.eps)}, RowTensor(a.cls), a.q);
  return {query, absorb(query, a.k_weight, a.num_heads, score_scale(a.k_weight.size(0) / a.num_heads))};
}

struct TokenPass {
  Tensor mean, rstd, probs;  // (batch, 1 + tokens) and (batch, heads, 1 + tokens); empty unless they are to be saved
  Tensor context;            // (batch, heads, width)
};
TokenPass token_pass(const ClsCrossAttention& a, const Tensor& key_query) {
  const int64_t batch = a.patches.size(0), tokens = a.patches.size(1), width = a.patches.size(2), heads = a.num_heads;
  const int64_t saved = a.save ? batch : 0;
  const Tensor mean = empty_f32({saved, 1 + tokens}), rstd = empty_f32({saved, 1 + tokens});
  const Tensor probs = empty_f32({saved, heads, 1 + tokens}), context = empty_f32({batch, heads, width});
  const Tensor dense = dense_rows(a.patches);
  const RowTensor cls(a.cls);
  TokenPassArgs args{.cls = rows_of(cls),
                     .patches = token_rows(dense),
                     .batch = batch,
                     .tokens = tokens,
                     .width = width,
                     .heads = heads,
                     .norm = norm_of(a.norm, a.eps, mean, rstd),
                     .key_query = float_data(key_query),
                     .probs = float_data(probs),
                     .context = float_data(context)};
  const auto plan = active().token_pass.plan(args, threads_here());
  Tensor partial;
  if (plan.splits > 1) {
    partial = empty_f32({batch, plan.splits, heads, width + 2});
    args.partial = float_data(partial);
  }
  launch(active().token_pass, args, plan);
  if (plan.splits > 1)
    launch(active().join_splits,
           JoinSplitsArgs{batch, plan.splits, tokens, width, heads, args.partial, args.probs, args.context});
  return {mean, rstd, probs, context};
}

Tensor cls_value(const ClsCrossAttention& a, const Tensor& context) {
  const Norm norm = norm_of(a.norm, a.eps);
  return project_heads(context, a.v.weight, norm.weight, norm.bias, vector_of(a.v.bias), 1.0, a.q.weight.scalar_type());
}

}  // namespace

ClsCrossAttention::Results cls_cross_attention(const ClsCrossAttention& a) {
  const auto [query, key_query] = cls_query(a);
  const auto [mean, rstd, probs, context] = token_pass(a, key_query);
  const Tensor out = cls_value(a, context);
  const auto kept = [&](const Tensor& t) {
    auto shape = t.sizes().vec();
    if (!a.save) shape[0] = 0;
    return a.save ? t : empty_f32(shape);
  };
  return {out, mean, rstd, probs, kept(context), kept(query), kept(key_query)};
}

// --- backward ------------------------------------------------------------------------------------------------------------

namespace {

// LayerNorm's affine part in float32, and the CLS tokens without it: (width), (width), (batch, width).
struct NormalizedCls {
  Tensor gamma, beta, normalized;
  Tensor rstd;  // (batch, 1)
  explicit NormalizedCls(const ClsCrossAttentionBackward& a)
      : gamma(a.norm.weight.to(kFloat32)),
        beta(a.norm.bias ? a.norm.bias->to(kFloat32) : zeros(gamma.sizes(), kFloat32, kOnCPU)),
        rstd(a.rstd.narrow(1, 0, 1)) {
    normalized = aten::mul(aten::add(a.cls.to(kFloat32), a.mean.narrow(1, 0, 1), -1), rstd);
  }
  Tensor affine(const Tensor& rows) const { return aten::add(aten::mul(rows, gamma), beta); }
};

struct ValueGradient {
  Tensor grad_value, grad_context;  // (batch, heads, width)
};
ValueGradient value_gradient(const ClsCrossAttentionBackward& a, const Tensor& grad_out, const Tensor& gamma) {
  const Tensor grad_value = absorb(grad_out, a.v_weight, a.num_heads, 1.0);
  return {grad_value, aten::mul(grad_value, gamma)};
}

struct TokenGradient {
  Tensor grad_patches;     // undefined where it is not wanted
  Tensor grad_normalized;  // (batch, width): of the CLS token, by way of keys and values
  Tensor grad_u;           // (batch, heads, width)
};
TokenGradient token_gradient(const ClsCrossAttentionBackward& a, const Tensor& grad_context) {
  const Tensor dense = dense_rows(a.patches);
  const RowTensor cls(a.cls);
  const TokenGradient result{a.needs.patches ? empty(dense.sizes(), dense.scalar_type()) : Tensor(),
                             empty_f32(a.cls.sizes()), empty_f32(a.context.sizes())};
  launch(active().token_gradient,
         TokenGradientArgs{.cls = rows_of(cls),
                           .patches = token_rows(dense),
                           .grad_patches = a.needs.patches ? token_rows(result.grad_patches) : Rows{},
                           .batch = dense.size(0),
                           .tokens = dense.size(1),
                           .width = dense.size(2),
                           .heads = a.num_heads,
                           .norm = norm_of(a.norm, 0, a.mean, a.rstd),
                           .key_query = float_data(a.key_query),
                           .probs = float_data(a.probs),
                           .context = float_data(a.context),
                           .grad_context = float_data(grad_context),
                           .grad_normalized = float_data(result.grad_normalized),
                           .grad_u = float_data(result.grad_u)});
  return result;
}

struct QueryGradient {
  Tensor grad_key_query, grad_query;  // (batch, heads, width), (batch, width)
};
QueryGradient query_gradient(const ClsCrossAttentionBackward& a, const Tensor& grad_u, const Tensor& gamma) {
  const Tensor grad_key_query = aten::mul(grad_u, gamma);
  const double scale = score_scale(a.k_weight.size(0) / a.num_heads);
  return {grad_key_query, project_heads(grad_key_query, a.k_weight, {}, {}, {}, scale, kFloat32)};
}

Tensor query_input_gradient(const Tensor& grad_query, const Tensor& q_weight) {
  return aten::mm(grad_query, q_weight.to(kFloat32));
}

// What the steps before projection_gradients and finish_gradients leave for these.
struct Steps {
  const ClsCrossAttentionBackward& a;
  const Tensor grad_out = a.grad_out.to(kFloat32).contiguous();
  const NormalizedCls cls{a};
  const ValueGradient value = value_gradient(a, grad_out, cls.gamma);
  const TokenGradient tokens = token_gradient(a, value.grad_context);
  const QueryGradient query = query_gradient(a, tokens.grad_u, cls.gamma);
  const Tensor grad_query_input = query_input_gradient(query.grad_query, a.q_weight);
  const int64_t batch = a.context.size(0), width = a.context.size(2), d = width / a.num_heads;
};

// The gradients of the three weights.
void projection_gradients(const Steps& steps, ClsCrossAttentionGradients& result) {
  const ClsCrossAttentionBackward& a = steps.a;
  const auto& [grad_key_query, grad_query] = steps.query;
  // (heads, d, batch) x (heads, batch, width): the outer products of every head, summed over the batch.
  const auto outer = [&](const Tensor& of_outputs, const Tensor& of_inputs) {
    return aten::bmm(of_outputs.view({steps.batch, a.num_heads, steps.d}).permute({1, 2, 0}),
                     of_inputs.permute({1, 0, 2}))
        .view({steps.width, steps.width});
  };
  if (a.needs.q_weight) result.q_weight = aten::mm(grad_query.permute({1, 0}), steps.cls.affine(steps.cls.normalized));
  if (a.needs.k_weight) result.k_weight = outer(aten::mul(a.query, score_scale(steps.d)), grad_key_query);
  if (a.needs.v_weight) result.v_weight = outer(steps.grad_out, steps.cls.affine(a.context));
}

// The gradient of the CLS token, from that of its normalized self.
Tensor cls_gradient(const NormalizedCls& cls, const Tensor& grad_normalized, const Tensor& grad_query_input) {
  const Tensor g = aten::add(grad_normalized, aten::mul(grad_query_input, cls.gamma));
  const Tensor along = aten::mean(aten::mul(g, cls.normalized), {1}, true);
  const Tensor across = aten::add(g, aten::mean(g, {1}, true), -1);
  return aten::mul(aten::add(across, aten::mul(cls.normalized, along), -1), cls.rstd);
}

// (batch, heads, tokens) -> (batch, heads, 1): 0, or NaN where the probability of a token is not finite.
Tensor zero_or_nan(const Tensor& probs) {
  const int64_t rows = probs.size(0) * probs.size(1), tokens = probs.size(2);
  const Tensor result = empty_f32({probs.size(0), probs.size(1), 1});
  const float* from = probs.const_data_ptr<float>();
  for (int64_t row = 0; row < rows; row++) {
    int strange = 0;
    for (int64_t i = row * tokens; i < (row + 1) * tokens; i++) strange |= from[i] - from[i] != 0;
    float_data(result)[row] = strange ? std::numeric_limits<float>::quiet_NaN() : 0;
  }
  return result;
}

// Sums over rows, and the CLS token's own gradient.
void finish_gradients(const Steps& steps, ClsCrossAttentionGradients& result) {
  const ClsCrossAttentionBackward& a = steps.a;
  const Tensor &grad_value = steps.value.grad_value, &grad_query_input = steps.grad_query_input;
  if (a.needs.cls) result.cls = cls_gradient(steps.cls, steps.tokens.grad_normalized, grad_query_input);
  if (a.needs.norm_weight) {
    const Tensor of_value = aten::mul(grad_value.to(kFloat64), a.context);
    const Tensor of_query = aten::mul(steps.tokens.grad_u.to(kFloat64), a.key_query);
    result.norm_weight = aten::add(aten::sum(aten::add(of_value, of_query), {0, 1}),
                                   aten::sum(aten::mul(grad_query_input, steps.cls.normalized), {0}));
  }
  if (a.needs.norm_bias) result.norm_bias = aten::add(aten::sum(grad_value, {0, 1}), aten::sum(grad_query_input, {0}));
  if (a.needs.q_bias) result.q_bias = aten::sum(steps.query.grad_query, {0});
  if (a.needs.k_bias) result.k_bias = zeros({steps.width}, kFloat32, kOnCPU);
  // The probabilities sum to one, unless they are not numbers, which this gradient must not be either then.
  if (a.needs.v_bias)
    result.v_bias =
        aten::sum(aten::add(steps.grad_out.view({steps.batch, a.num_heads, steps.d}), zero_or_nan(a.probs)), {0})
            .view({steps.width});
}

std::vector<Tensor> cls_cross_attention_backward(const ClsCrossAttentionBackward& a, bool wide) {
  const Steps steps{a};
  ClsCrossAttentionGradients result;
  result.patches = steps.tokens.grad_patches;
  projection_gradients(steps, result);
  finish_gradients(steps, result);
  const auto convert = [](Tensor& gradient, ScalarType dtype) {
    if (gradient.defined()) gradient = gradient.to(dtype);
  };
  convert(result.cls, a.cls.scalar_type());
  convert(result.norm_weight, a.norm.weight.scalar_type());
  if (a.norm.bias) convert(result.norm_bias, a.norm.bias->scalar_type());
  for (Tensor* gradient :
       {&result.q_weight, &result.q_bias, &result.k_weight, &result.k_bias, &result.v_weight, &result.v_bias})
    convert(*gradient, wide ? kFloat32 : a.q_weight.scalar_type());
  return result.in_order();
}

const Library of_cls_cross_attention = ops().define<cls_cross_attention>().define<cls_cross_attention_backward>();

}  // namespace

}  // namespace crossvit
