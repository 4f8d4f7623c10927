// cls_cross_attention on CUDA tensors: query and absorbed key, one pass over the tokens, value.
#include "cuda/cls_cross_attention.h"

#include <ATen/ops/zeros.h>

#include <tuple>
#include <vector>

#include "cuda/check.h"
#include "cuda/cls_gradients.h"
#include "cuda/cls_tensors.h"
#include "cuda/token_gradient.h"

namespace crossvit::cuda {

using CrossAttentionResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

CrossAttentionResult cls_cross_attention(const Tensor& cls, const Tensor& patches, const Tensor& norm_weight,
                                         const OptionalTensor& norm_bias, const Tensor& q_weight,
                                         const OptionalTensor& q_bias, const Tensor& k_weight, const Tensor& v_weight,
                                         const OptionalTensor& v_bias, int64_t num_heads, double eps, bool save) {
  arguments::cls_cross_attention(taken(), cls, patches, norm_weight, norm_bias, q_weight, q_bias, k_weight, v_weight,
                                 v_bias, num_heads, eps);
  const DeviceGuard guard(patches.device());
  const Stream stream = stream_of(patches);
  const int64_t batch = patches.size(0), tokens = 1 + patches.size(1), width = patches.size(2);
  const int64_t kept = save ? batch : 0;
  const DenseTokens dense(cls, patches, num_heads);
  const Parameters norm{norm_weight, norm_bias, q_bias, v_bias};
  const Weights weights{q_weight, k_weight, v_weight};
  const Type type = type_of(q_weight);

  ClsQuery query = query_of(dense, norm, 0, 2, weights[0], weights[1], type, weights.aligned(), eps);
  const Tensor queries = empty_f32({kept, width}, patches);
  const Tensor key_query = empty_f32({batch, num_heads, width}, patches);
  if (save) query.query = queries.mutable_data_ptr<float>();
  query.key_query = key_query.mutable_data_ptr<float>();
  check(cls_query(query, stream), "cls_query");

  const Tensor mean = empty_f32({kept, tokens}, patches), rstd = empty_f32({kept, tokens}, patches);
  const Tensor probs = empty_f32({kept, num_heads, tokens}, patches);
  SplitResults of_splits(dense, query);
  TokenPass& pass = of_splits.pass;
  if (save) {
    pass.mean = mean.mutable_data_ptr<float>();
    pass.rstd = rstd.mutable_data_ptr<float>();
    pass.scores = probs.mutable_data_ptr<float>();
  }
  const int64_t splits = pass.plan.splits;
  check(token_pass(pass, stream), "token_pass");

  const Tensor context = !save         ? empty_f32({0, num_heads, width}, patches)
                         : splits == 1 ? of_splits.context.view({batch, num_heads, width})
                                       : empty_f32({batch, num_heads, width}, patches);
  const Tensor out = empty({batch, width}, q_weight.scalar_type(), patches);
  ClsValue value{};
  value.contexts = {pass.context, pass.softmax, static_cast<int>(splits), nullptr};
  if (save && splits > 1) value.contexts.joined = context.mutable_data_ptr<float>();
  value.probs = pass.scores;
  value.tokens = static_cast<int>(tokens);
  value.batch = batch;
  value.width = static_cast<int>(width);
  value.heads = static_cast<int>(num_heads);
  value.norm_weight = query.norm_weight;
  value.norm_bias = query.norm_bias;
  value.v_bias = norm[3];
  value.v_weight = weights[2];
  value.type = type;
  value.tf32 = query.tf32;
  value.aligned = query.aligned;
  value.out = out.mutable_data_ptr();
  check(cls_value(value, stream), "cls_value");
  return {out, mean, rstd, probs, context, queries, save ? key_query : empty_f32({0, num_heads, width}, patches)};
}

namespace {

float* pointer(const Tensor& t) { return t.defined() ? t.mutable_data_ptr<float>() : nullptr; }
void* untyped(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

}  // namespace

std::vector<Tensor> cls_cross_attention_backward(const Tensor& grad_out, const Tensor& cls, const Tensor& patches,
                                                 const Tensor& norm_weight, const OptionalTensor& norm_bias,
                                                 const Tensor& q_weight, const Tensor& k_weight, const Tensor& v_weight,
                                                 const Tensor& mean, const Tensor& rstd, const Tensor& probs,
                                                 const Tensor& context, const Tensor& query, const Tensor& key_query,
                                                 int64_t num_heads, Needs needs) {
  arguments::cls_cross_attention_backward(taken(), grad_out, cls, patches, norm_weight, norm_bias, q_weight, k_weight,
                                          v_weight, mean, rstd, probs, context, query, key_query, num_heads, needs);
  const DeviceGuard guard(patches.device());
  const Stream stream = stream_of(patches);
  const int64_t batch = patches.size(0), tokens = 1 + patches.size(1), width = patches.size(2);
  const DenseTokens dense(cls, patches, num_heads);
  const Parameters norm{norm_weight, norm_bias};
  const Weights weights{q_weight, k_weight, v_weight};
  const Type type = type_of(q_weight);
  const bool tf32 = allow_tf32(), aligned = weights.aligned();
  const Tensor grad = grad_out.to(q_weight.scalar_type()).contiguous();
  // The saved tensors of other backends are contiguous, too.
  const float *const means_of = mean.const_data_ptr<float>(), *const rstds_of = rstd.const_data_ptr<float>();
  const FirstTokens first{dense.tokens.cls, dense.tokens.cls_type,   dense.tokens.cls_stride, means_of,
                          rstds_of,         static_cast<int>(tokens)};

  // In the order of the schema: cls, patches, norm_weight, norm_bias, then weight and bias of q, k and v.
  const auto like = [&](int64_t i, at::IntArrayRef shape, at::ScalarType dtype) {
    return needs.get(i) ? empty(shape, dtype, patches) : Tensor();
  };
  const auto matrix = q_weight.scalar_type();
  std::vector<Tensor> grads{like(0, {batch, width}, cls.scalar_type()),
                            like(1, {batch, tokens - 1, width}, patches.scalar_type()),
                            like(2, {width}, norm_weight.scalar_type()),
                            like(3, {width}, norm_bias ? norm_bias->scalar_type() : at::kFloat),
                            like(4, {width, width}, matrix),
                            like(5, {width}, matrix),
                            like(6, {width, width}, matrix),
                            needs.get(7) ? at::zeros({width}, k_weight.options()) : Tensor(),
                            like(8, {width, width}, matrix),
                            like(9, {width}, matrix)};
  const bool to_query_input = needs.get(0) || needs.get(2) || needs.get(3);
  const bool to_query = to_query_input || needs.get(4) || needs.get(5) || needs.get(6);

  Tensor weight_parts, bias_parts, rests, sums, grad_query, grad_normalized, grad_input;
  const int64_t blocks = (batch + 15) / 16, of_heads = blocks * num_heads;  // rows of the norm's gradients
  int splits = 1;
  if (to_query || needs.get(1)) {
    if (needs.get(2)) weight_parts = empty_f32({2 * of_heads + blocks, width}, patches);
    if (needs.get(3)) bias_parts = empty_f32({of_heads + blocks, width}, patches);
    const auto parts = [&](int64_t weight_row, int64_t bias_row) {
      return NormParts{weight_parts.defined() ? pointer(weight_parts) + weight_row * width : nullptr,
                       bias_parts.defined() && bias_row >= 0 ? pointer(bias_parts) + bias_row * width : nullptr};
    };
    const Tensor pairs = empty({batch, num_heads, 2, width}, matrix, patches);
    const Tensor means = empty_f32({batch, num_heads, 2}, patches), delta = empty_f32({batch, num_heads}, patches);
    ValueGradient value{};
    value.grad_out = grad.const_data_ptr();
    value.v_weight = weights[2];
    value.key_query = key_query.const_data_ptr<float>();
    value.context = context.const_data_ptr<float>();
    value.norm_weight = norm[0];
    value.type = type;
    value.tf32 = tf32;
    value.aligned = aligned;
    value.batch = batch;
    value.width = static_cast<int>(width);
    value.heads = static_cast<int>(num_heads);
    value.pairs = pairs.mutable_data_ptr();
    value.means = pointer(means);
    value.delta = pointer(delta);
    value.parts = parts(0, 0);
    check(value_gradient(value, stream), "value_gradient");

    TokenGradient pass{};
    pass.tokens = dense.tokens;
    pass.plan = plan_token_gradient(dense.tokens, type);
    check_width(pass.plan.shared, width);
    splits = pass.plan.splits;
    pass.type = type;
    pass.tf32 = tf32;
    pass.pairs = value.pairs;
    pass.means = value.means;
    pass.delta = value.delta;
    pass.mean = means_of;
    pass.rstd = rstds_of;
    pass.probs = probs.const_data_ptr<float>();
    if (needs.get(0)) grad_normalized = empty_f32({batch, width}, patches);
    pass.grad_normalized = pointer(grad_normalized);
    sums = empty_f32({batch, splits, num_heads, width}, patches);
    rests = empty_f32({batch, splits, num_heads}, patches);
    pass.sums = pointer(sums);
    pass.rests = pointer(rests);
    // Of more heads than a block takes, each set adds its part.
    Tensor earlier;
    for (pass.set = 0; pass.set < pass.plan.sets; pass.set++) {
      const bool last = pass.set + 1 == pass.plan.sets;
      const Tensor out = !needs.get(1) || last ? grads[1] : empty_f32({batch, tokens - 1, width}, patches);
      pass.grad_patches = untyped(out);
      pass.earlier = pointer(earlier);
      if (out.defined()) {
        pass.grad_type = type_of(out);
        pass.grad_aligned = aligned_to_16(out);
      }
      check(token_gradient(pass, stream), "token_gradient");
      earlier = out;
    }

    if (to_query) {
      const Tensor partial = sums;
      if (splits > 1) sums = empty_f32({batch, num_heads, width}, patches);
      grad_query = empty_f32({batch, width}, patches);
      QueryGradient of_query{};
      of_query.partial = pointer(partial);
      of_query.rests = pointer(rests);
      of_query.key_query = value.key_query;
      of_query.context = value.context;
      of_query.splits = splits;
      of_query.norm_weight = norm[0];
      of_query.k_weight = weights[1];
      of_query.type = type;
      of_query.tf32 = tf32;
      of_query.aligned = aligned;
      of_query.batch = batch;
      of_query.width = value.width;
      of_query.heads = value.heads;
      of_query.sums = pointer(sums);
      of_query.grad_query = pointer(grad_query);
      of_query.parts = parts(of_heads, -1);
      check(query_gradient(of_query, stream), "query_gradient");
    }
    if (to_query_input) {
      grad_input = empty_f32({batch, width}, patches);
      const QueryInputGradient input{
          pointer(grad_query),          weights[0], first, type, tf32, aligned, batch, value.width, pointer(grad_input),
          parts(2 * of_heads, of_heads)};
      check(query_input_gradient(input, stream), "query_input_gradient");
    }
  }
  if (needs.get(4) || needs.get(6) || needs.get(8)) {
    WeightGradients of_weights{};
    of_weights.grad_out = grad.const_data_ptr();
    of_weights.context = context.const_data_ptr<float>();
    of_weights.query = query.const_data_ptr<float>();
    of_weights.sums = pointer(sums);
    of_weights.grad_query = pointer(grad_query);
    of_weights.first = first;
    of_weights.norm_weight = norm[0];
    of_weights.norm_bias = norm[1];
    of_weights.type = type;
    of_weights.tf32 = tf32;
    of_weights.batch = batch;
    of_weights.width = static_cast<int>(width);
    of_weights.heads = static_cast<int>(num_heads);
    of_weights.q_weight = untyped(grads[4]);
    of_weights.k_weight = untyped(grads[6]);
    of_weights.v_weight = untyped(grads[8]);
    check(weight_gradients(of_weights, stream), "weight_gradients");
  }
  if (to_query_input || needs.get(5) || needs.get(9)) {
    FinishGradients finish{};
    finish.parts = {pointer(weight_parts), pointer(bias_parts)};
    finish.weight_rows = 2 * of_heads + blocks;
    finish.bias_rows = of_heads + blocks;
    finish.grad_query = pointer(grad_query);
    finish.probs = probs.const_data_ptr<float>();
    finish.rests = pointer(rests);
    finish.key_query = key_query.const_data_ptr<float>();
    finish.grad_normalized = pointer(grad_normalized);
    finish.grad_input = pointer(grad_input);
    finish.grad_out = grad.const_data_ptr();
    finish.type = type;
    finish.splits = splits;
    finish.first = first;
    finish.norm_weight = norm[0];
    finish.batch = batch;
    finish.width = static_cast<int>(width);
    finish.heads = static_cast<int>(num_heads);
    const auto target = [&](int64_t i, void*& data, Type& of) {
      if (!grads[i].defined()) return;
      data = untyped(grads[i]);
      of = type_of(grads[i]);
    };
    target(0, finish.cls, finish.cls_type);
    target(2, finish.norm_weight_out, finish.norm_weight_type);
    target(3, finish.norm_bias_out, finish.norm_bias_type);
    target(5, finish.q_bias, finish.q_bias_type);
    target(9, finish.v_bias, finish.v_bias_type);
    check(finish_gradients(finish, stream), "finish_gradients");
  }
  std::vector<Tensor> result;
  for (const Tensor& t : grads)
    if (t.defined()) result.push_back(t);
  return result;
}

}  // namespace crossvit::cuda

TORCH_LIBRARY_FRAGMENT(crossvit_kernels_cuda, m) {
  crossvit::cuda::define(m, crossvit::schema::cls_cross_attention, TORCH_FN(crossvit::cuda::cls_cross_attention));
  crossvit::cuda::define(m, crossvit::schema::cls_cross_attention_backward,
                         TORCH_FN(crossvit::cuda::cls_cross_attention_backward));
}
