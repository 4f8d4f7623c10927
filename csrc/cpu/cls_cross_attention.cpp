// cls_cross_attention on the CPU: the steps of docs/design/cls_cross_attention.md, each a function of its name. Their kernels are
// in token_pass.h, token_gradient.h and heads.h.
#include "launch.h"
#include "linear_rows.h"
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
  AbsorbArgs args{rows.const_data_ptr<float>(), matrix.matrix,  float_data(result),       rows.size(0), num_heads,
                  weight.size(0) / num_heads,   weight.size(1), static_cast<float>(scale)};
  launch(active().absorb, args);
  return result;
}

// (W_h (gamma . rows_h + beta) + bias) * scale for every head: (batch, heads, width) -> (batch, heads * d).
Tensor project_heads(const Tensor& rows, const Tensor& weight, Vector gamma, Vector beta, Vector bias, double scale,
                     ScalarType dtype) {
  const WeightTensor matrix(weight);
  const int64_t batch = rows.size(0), num_heads = rows.size(1);
  const Tensor out = empty({batch, weight.size(0)}, dtype);
  ProjectHeadsArgs args{};
  args.rows = rows.const_data_ptr<float>();
  args.weight = matrix.matrix;
  args.gamma = gamma;
  args.beta = beta;
  args.bias = bias;
  args.out = rows_of(RowTensor(out));
  args.batch = batch;
  args.heads = num_heads;
  args.head_width = weight.size(0) / num_heads;
  args.width = weight.size(1);
  args.scale = static_cast<float>(scale);
  launch(active().project_heads, args);
  return out;
}

// Patches as the passes over the tokens walk them, their width contiguous.
Rows token_rows(const Tensor& patches) {
  return {const_cast<void*>(patches.const_data_ptr()), dtype_of(patches), patches.size(1), patches.stride(0),
          patches.stride(1)};
}

// What token_pass and token_gradient are both told.
template <class Args>
Args token_args(const RowTensor& cls, const Tensor& patches, int64_t num_heads, const Norm& norm, const Tensor& mean,
                const Tensor& rstd, const Tensor& key_query) {
  Args args{};
  args.cls = rows_of(cls);
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

// --- forward -------------------------------------------------------------------------------------------------------------

struct ClsQuery {
  Tensor query, key_query;  // (batch, width), (batch, heads, width)
};
ClsQuery cls_query(const Tensor& cls, const Norm& norm, const Tensor& q_weight, const OptionalTensor& q_bias,
                   const Tensor& k_weight, int64_t num_heads) {
  const Tensor query = linear_rows(cls, norm, false, q_weight, q_bias, {}, kFloat32);
  return {query, absorb(query, k_weight, num_heads, score_scale(k_weight.size(0) / num_heads))};
}

struct TokenPass {
  Tensor mean, rstd, probs;  // (batch, 1 + tokens) and (batch, heads, 1 + tokens); empty unless they are to be saved
  Tensor context;            // (batch, heads, width)
};
TokenPass token_pass(const Tensor& cls, const Tensor& patches, const Norm& norm, const Tensor& key_query,
                     int64_t num_heads, bool save) {
  const int64_t batch = patches.size(0), tokens = patches.size(1), width = patches.size(2);
  const int64_t saved = save ? batch : 0;
  const Tensor mean = empty_f32({saved, 1 + tokens}), rstd = empty_f32({saved, 1 + tokens});
  const Tensor probs = empty_f32({saved, num_heads, 1 + tokens}), context = empty_f32({batch, num_heads, width});
  const Tensor dense = dense_rows(patches);
  const RowTensor cls_rows(cls);
  auto args = token_args<TokenPassArgs>(cls_rows, dense, num_heads, norm, mean, rstd, key_query);
  args.probs = float_data(probs);
  args.context = float_data(context);
  const auto plan = active().token_pass.plan(args, threads_here());
  Tensor partial;
  if (plan.splits > 1) {
    partial = empty_f32({batch, plan.splits, num_heads, width + 2});
    args.partial = float_data(partial);
  }
  launch(active().token_pass, args, plan);
  if (plan.splits > 1)
    launch(active().join_splits,
           JoinSplitsArgs{batch, plan.splits, tokens, width, num_heads, args.partial, args.probs, args.context});
  return {mean, rstd, probs, context};
}

Tensor cls_value(const Tensor& context, const Norm& norm, const Tensor& v_weight, const OptionalTensor& v_bias,
                 ScalarType dtype) {
  return project_heads(context, v_weight, norm.weight, norm.bias, vector_of(v_bias), 1.0, dtype);
}

}  // namespace

namespace unchecked {

CrossAttentionResult cls_cross_attention(const Tensor& cls, const Tensor& patches, const Tensor& norm_weight,
                                         const OptionalTensor& norm_bias, const Tensor& q_weight,
                                         const OptionalTensor& q_bias, const Tensor& k_weight, const Tensor& v_weight,
                                         const OptionalTensor& v_bias, int64_t num_heads, double eps, bool save) {
  const Norm norm = norm_of(norm_weight, norm_bias, eps);
  const auto [query, key_query] = cls_query(cls, norm, q_weight, q_bias, k_weight, num_heads);
  const auto [mean, rstd, probs, context] = token_pass(cls, patches, norm, key_query, num_heads, save);
  const Tensor out = cls_value(context, norm, v_weight, v_bias, q_weight.scalar_type());
  const auto kept = [&](const Tensor& t) {
    auto shape = t.sizes().vec();
    if (!save) shape[0] = 0;
    return save ? t : empty_f32(shape);
  };
  return {out, mean, rstd, probs, kept(context), kept(query), kept(key_query)};
}

}  // namespace unchecked

CrossAttentionResult cls_cross_attention(const Tensor& cls, const Tensor& patches, const Tensor& norm_weight,
                                         const OptionalTensor& norm_bias, const Tensor& q_weight,
                                         const OptionalTensor& q_bias, const Tensor& k_weight, const Tensor& v_weight,
                                         const OptionalTensor& v_bias, int64_t num_heads, double eps, bool save) {
  arguments::cls_cross_attention(kTaken, cls, patches, norm_weight, norm_bias, q_weight, q_bias, k_weight, v_weight,
                                 v_bias, num_heads, eps);
  return unchecked::cls_cross_attention(cls, patches, norm_weight, norm_bias, q_weight, q_bias, k_weight, v_weight,
                                        v_bias, num_heads, eps, save);
}

// --- backward ------------------------------------------------------------------------------------------------------------

namespace {

// What the forward saved.
struct Saved {
  const Tensor &mean, &rstd, &probs, &context, &query, &key_query;
};

// LayerNorm's affine part in float32, and the CLS tokens without it: (width), (width), (batch, width).
struct NormalizedCls {
  Tensor gamma, beta, normalized;
  Tensor rstd;  // (batch, 1)
  NormalizedCls(const Tensor& cls, const Tensor& norm_weight, const OptionalTensor& norm_bias, const Saved& saved)
      : gamma(norm_weight.to(kFloat32)),
        beta(norm_bias ? norm_bias->to(kFloat32) : zeros(gamma.sizes(), kFloat32, kOnCPU)),
        rstd(saved.rstd.narrow(1, 0, 1)) {
    normalized = aten::mul(aten::add(cls.to(kFloat32), saved.mean.narrow(1, 0, 1), -1), rstd);
  }
  Tensor affine(const Tensor& rows) const { return aten::add(aten::mul(rows, gamma), beta); }
};

struct ValueGradient {
  Tensor grad_value, grad_context;  // (batch, heads, width)
};
ValueGradient value_gradient(const Tensor& grad_out, const Tensor& v_weight, const Tensor& gamma, int64_t num_heads) {
  const Tensor grad_value = absorb(grad_out, v_weight, num_heads, 1.0);
  return {grad_value, aten::mul(grad_value, gamma)};
}

struct TokenGradient {
  Tensor grad_patches;     // undefined where it is not wanted
  Tensor grad_normalized;  // (batch, width): of the CLS token, by way of keys and values
  Tensor grad_u;           // (batch, heads, width)
};
TokenGradient token_gradient(const Tensor& cls, const Tensor& patches, const Norm& norm, const Saved& saved,
                             const Tensor& grad_context, int64_t num_heads, bool patches_wanted) {
  const int64_t batch = patches.size(0), width = patches.size(2);
  const Tensor dense = dense_rows(patches);
  const RowTensor cls_rows(cls);
  const TokenGradient result{patches_wanted ? empty(patches.sizes(), patches.scalar_type()) : Tensor(),
                             empty_f32({batch, width}), empty_f32({batch, num_heads, width})};
  auto args = token_args<TokenGradientArgs>(cls_rows, dense, num_heads, norm, saved.mean, saved.rstd, saved.key_query);
  if (patches_wanted) args.grad_patches = token_rows(result.grad_patches);
  args.probs = float_data(saved.probs);
  args.context = float_data(saved.context);
  args.grad_context = float_data(grad_context);
  args.grad_normalized = float_data(result.grad_normalized);
  args.grad_u = float_data(result.grad_u);
  launch(active().token_gradient, args);
  return result;
}

struct QueryGradient {
  Tensor grad_key_query, grad_query;  // (batch, heads, width), (batch, width)
};
QueryGradient query_gradient(const Tensor& grad_u, const Tensor& k_weight, const Tensor& gamma, int64_t num_heads) {
  const Tensor grad_key_query = aten::mul(grad_u, gamma);
  const double scale = score_scale(k_weight.size(0) / num_heads);
  return {grad_key_query, project_heads(grad_key_query, k_weight, {}, {}, {}, scale, kFloat32)};
}

Tensor query_input_gradient(const Tensor& grad_query, const Tensor& q_weight) {
  return aten::mm(grad_query, q_weight.to(kFloat32));
}

// What the steps before projection_gradients and finish_gradients leave for these.
struct StepGradients {
  ValueGradient value;
  TokenGradient tokens;
  QueryGradient query;
  Tensor grad_query_input;
};

// The gradients of the three weights.
void projection_gradients(const ClsCrossAttentionNeeds& needs, const NormalizedCls& cls, const Saved& saved,
                          const Tensor& grad_out, const StepGradients& steps, ClsCrossAttentionGradients& result) {
  const int64_t batch = saved.context.size(0), num_heads = saved.context.size(1), width = saved.context.size(2);
  const int64_t d = width / num_heads;
  // (heads, d, batch) x (heads, batch, width): the outer products of every head, summed over the batch.
  const auto outer = [&](const Tensor& of_outputs, const Tensor& of_inputs) {
    return aten::bmm(of_outputs.view({batch, num_heads, d}).permute({1, 2, 0}), of_inputs.permute({1, 0, 2}))
        .view({width, width});
  };
  if (needs.q_weight) result.q_weight = aten::mm(steps.query.grad_query.permute({1, 0}), cls.affine(cls.normalized));
  if (needs.k_weight) result.k_weight = outer(aten::mul(saved.query, score_scale(d)), steps.query.grad_key_query);
  if (needs.v_weight) result.v_weight = outer(grad_out, cls.affine(saved.context));
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
void finish_gradients(const ClsCrossAttentionNeeds& needs, const NormalizedCls& cls, const Saved& saved,
                      const Tensor& grad_out, const StepGradients& steps, ClsCrossAttentionGradients& result) {
  const auto& [grad_value, grad_context] = steps.value;
  const Tensor &grad_u = steps.tokens.grad_u, &grad_query = steps.query.grad_query;
  const int64_t batch = saved.context.size(0), num_heads = saved.context.size(1), width = saved.context.size(2);
  if (needs.cls) result.cls = cls_gradient(cls, steps.tokens.grad_normalized, steps.grad_query_input);
  if (needs.norm_weight) {
    const Tensor of_value = aten::mul(grad_value.to(kFloat64), saved.context);
    const Tensor of_query = aten::mul(grad_u.to(kFloat64), saved.key_query);
    result.norm_weight = aten::add(aten::sum(aten::add(of_value, of_query), {0, 1}),
                                   aten::sum(aten::mul(steps.grad_query_input, cls.normalized), {0}));
  }
  if (needs.norm_bias)
    result.norm_bias = aten::add(aten::sum(grad_value, {0, 1}), aten::sum(steps.grad_query_input, {0}));
  if (needs.q_bias) result.q_bias = aten::sum(grad_query, {0});
  if (needs.k_bias) result.k_bias = zeros({width}, kFloat32, kOnCPU);
  // The probabilities sum to one, unless they are not numbers, which this gradient must not be either then.
  if (needs.v_bias)
    result.v_bias =
        aten::sum(aten::add(grad_out.view({batch, num_heads, width / num_heads}), zero_or_nan(saved.probs)), {0})
            .view({width});
}

}  // namespace

std::vector<Tensor> cls_cross_attention_backward(const Tensor& grad_out, const Tensor& cls, const Tensor& patches,
                                                 const Tensor& norm_weight, const OptionalTensor& norm_bias,
                                                 const Tensor& q_weight, const Tensor& k_weight, const Tensor& v_weight,
                                                 const Tensor& mean, const Tensor& rstd, const Tensor& probs,
                                                 const Tensor& context, const Tensor& query, const Tensor& key_query,
                                                 int64_t num_heads, NeedsList list, bool wide) {
  const auto needs = arguments::cls_cross_attention_backward(kTaken, grad_out, cls, patches, norm_weight, norm_bias,
                                                             q_weight, k_weight, v_weight, mean, rstd, probs, context,
                                                             query, key_query, num_heads, list);
  const Saved saved{mean, rstd, probs, context, query, key_query};
  const NormalizedCls normalized(cls, norm_weight, norm_bias, saved);
  const Tensor grad = grad_out.to(kFloat32).contiguous();

  StepGradients steps;
  steps.value = value_gradient(grad, v_weight, normalized.gamma, num_heads);
  steps.tokens = token_gradient(cls, patches, norm_of(norm_weight, norm_bias, 0), saved, steps.value.grad_context,
                                num_heads, needs.patches);
  steps.query = query_gradient(steps.tokens.grad_u, k_weight, normalized.gamma, num_heads);
  steps.grad_query_input = query_input_gradient(steps.query.grad_query, q_weight);

  ClsCrossAttentionGradients result;
  result.patches = steps.tokens.grad_patches;
  projection_gradients(needs, normalized, saved, grad, steps, result);
  finish_gradients(needs, normalized, saved, grad, steps, result);
  const auto convert = [](Tensor& gradient, ScalarType dtype) {
    if (gradient.defined()) gradient = gradient.to(dtype);
  };
  convert(result.cls, cls.scalar_type());
  convert(result.norm_weight, norm_weight.scalar_type());
  if (norm_bias) convert(result.norm_bias, norm_bias->scalar_type());
  for (Tensor* gradient :
       {&result.q_weight, &result.q_bias, &result.k_weight, &result.k_bias, &result.v_weight, &result.v_bias})
    convert(*gradient, wide ? kFloat32 : q_weight.scalar_type());
  return result.in_order();
}

}  // namespace crossvit
