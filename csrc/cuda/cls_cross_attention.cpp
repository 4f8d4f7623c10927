// cls_cross_attention on CUDA tensors: query and absorbed key, one pass over the tokens, value.
#include "cuda/cls_cross_attention.h"

#include <vector>

#include "cuda/cls_cross_attention_backward.h"
#include "cuda/cls_tensors.h"

namespace crossvit::cuda {

namespace {

ClsCrossAttention::Results cls_cross_attention(const ClsCrossAttention& a, bool tf32) {
  const Call call(a.patches, tf32);
  const int64_t batch = a.patches.size(0), tokens = 1 + a.patches.size(1), width = a.patches.size(2);
  const int64_t heads = a.num_heads, kept = a.save ? batch : 0;
  const DenseTokens dense(a.cls, a.patches, heads);
  const ProjectionWeights weights(a.q.weight, a.k_weight, a.v.weight);

  ClsQuery query = query_of(call, dense, a.norm, a.q.bias, weights, weights.aligned(), a.eps);
  const Tensor queries = empty_f32({kept, width}, a.patches);
  const Tensor key_query = empty_f32({batch, heads, width}, a.patches);
  query.query = float_data(queries);
  query.key_query = float_data(key_query);
  check(cls_query(query, call.stream), "cls_query");

  const Tensor mean = empty_f32({kept, tokens}, a.patches), rstd = empty_f32({kept, tokens}, a.patches);
  const Tensor probs = empty_f32({kept, heads, tokens}, a.patches);
  SplitResults of_splits(dense, query);
  TokenPass& pass = of_splits.pass;
  pass.mean = float_data(mean);
  pass.rstd = float_data(rstd);
  pass.scores = float_data(probs);
  const int splits = pass.plan.splits;
  check(token_pass(pass, call.stream), "token_pass");

  const Tensor context = a.save && splits == 1 ? of_splits.context.view({batch, heads, width})
                                               : empty_f32({kept, heads, width}, a.patches);
  const Tensor out = empty({batch, width}, weights.q.scalar_type(), a.patches);
  const ClsValue value{
      .contexts = {pass.context, pass.softmax, splits, a.save && splits > 1 ? float_data(context) : nullptr},
      .probs = pass.scores,
      .tokens = static_cast<int>(tokens),
      .batch = batch,
      .width = dense.tokens.width,
      .heads = dense.tokens.heads,
      .norm_weight = query.norm_weight,
      .norm_bias = query.norm_bias,
      .v_bias = vector_of(a.v.bias),
      .v_weight = weights.v.const_data_ptr(),
      .dtype = query.dtype,
      .tf32 = query.tf32,
      .aligned = query.aligned,
      .out = out.data_ptr()};
  check(cls_value(value, call.stream), "cls_value");
  return {out, mean, rstd, probs, context, queries, a.save ? key_query : empty_f32({0, heads, width}, a.patches)};
}

// The backward, a step of docs/design/cls_cross_attention.md a function. Each leaves what the steps behind it take in tensors of
// the step's names; one that is not needed is not defined.
class Backward {
 public:
  Backward(const Call& call, const ClsCrossAttentionBackward& a)
      : a_(a),
        stream_(call.stream),
        batch_(a.patches.size(0)),
        heads_(a.num_heads),
        width_(a.patches.size(2)),
        dense_(a.cls, a.patches, a.num_heads),
        weights_(a.q_weight, a.k_weight, a.v_weight),
        grad_out_(a.grad_out.to(weights_.q.scalar_type()).contiguous()),
        product_{dtype_of(weights_.q), call.tf32, weights_.aligned(), batch_, dense_.tokens.width, dense_.tokens.heads},
        normalized_cls_{dense_.tokens.cls,  dense_.tokens.cls_dtype, dense_.tokens.cls_stride,
                        float_data(a.mean), float_data(a.rstd),      1 + dense_.tokens.patches} {
    const auto like = [&](bool needed, Sizes shape, ScalarType dtype) {
      return needed ? empty(shape, dtype, a.patches) : Tensor();
    };
    const auto of_tensor = [&](bool needed, const Tensor& t) { return like(needed, t.sizes(), t.scalar_type()); };
    const auto matrix = weights_.q.scalar_type();
    grads_ = {.cls = of_tensor(a.needs.cls, a.cls),
              .patches = of_tensor(a.needs.patches, a.patches),
              .norm_weight = of_tensor(a.needs.norm_weight, a.norm.weight),
              .norm_bias = of_tensor(a.needs.norm_bias, a.norm.bias ? *a.norm.bias : a.norm.weight),
              .q_weight = like(a.needs.q_weight, {width_, width_}, matrix),
              .q_bias = like(a.needs.q_bias, {width_}, matrix),
              .k_weight = like(a.needs.k_weight, {width_, width_}, matrix),
              .k_bias = a.needs.k_bias ? zeros({width_}, matrix, a.patches.device()) : Tensor(),
              .v_weight = like(a.needs.v_weight, {width_, width_}, matrix),
              .v_bias = like(a.needs.v_bias, {width_}, matrix)};
    // The rows of NormParts: of value_gradient, query_gradient (the weight's alone) and query_input_gradient.
    blocks_ = (batch_ + 15) / 16;
    of_heads_ = blocks_ * heads_;
    weight_rows_ = 2 * of_heads_ + blocks_;
    bias_rows_ = of_heads_ + blocks_;
  }

  std::vector<Tensor> run() {
    const bool to_query_input = a_.needs.cls || a_.needs.norm_weight || a_.needs.norm_bias;
    const bool to_query = to_query_input || a_.needs.q_weight || a_.needs.q_bias || a_.needs.k_weight;
    if (to_query || a_.needs.patches) {
      if (a_.needs.norm_weight) weight_parts_ = empty_f32({weight_rows_, width_}, grad_out_);
      if (a_.needs.norm_bias) bias_parts_ = empty_f32({bias_rows_, width_}, grad_out_);
      value_gradient();
      token_gradient();
    }
    if (to_query) query_gradient();
    if (to_query_input) query_input_gradient();
    if (a_.needs.q_weight || a_.needs.k_weight || a_.needs.v_weight) projection_gradients();
    if (to_query_input || a_.needs.q_bias || a_.needs.v_bias) finish_gradients();
    return grads_.in_order();
  }

 private:
  NormParts parts(int64_t weight_row, int64_t bias_row) const {
    return {weight_parts_.defined() ? float_data(weight_parts_) + weight_row * width_ : nullptr,
            bias_parts_.defined() ? float_data(bias_parts_) + bias_row * width_ : nullptr};
  }

  void value_gradient() {
    u_grad_context_ = empty({batch_, heads_, 2, width_}, weights_.q.scalar_type(), grad_out_);
    row_means_ = empty_f32({batch_, heads_, 2}, grad_out_);
    delta_ = empty_f32({batch_, heads_}, grad_out_);
    const ValueGradient args{.product = product_,
                             .grad_out = grad_out_.const_data_ptr(),
                             .v_weight = weights_.v.const_data_ptr(),
                             .key_query = float_data(a_.key_query),
                             .context = float_data(a_.context),
                             .norm_weight = vector_of(a_.norm.weight),
                             .u_grad_context = data_of(u_grad_context_),
                             .row_means = float_data(row_means_),
                             .delta = float_data(delta_),
                             .parts = parts(0, 0)};
    check(cuda::value_gradient(args, stream_), "value_gradient");
  }

  void token_gradient() {
    const TokenPlan plan = plan_token_gradient(dense_.tokens, product_.dtype);
    check_width(plan.shared, width_);
    splits_ = plan.splits;
    if (a_.needs.cls) grad_normalized_ = empty_f32({batch_, width_}, grad_out_);
    grad_u_of_splits_ = empty_f32({batch_, splits_, heads_, width_}, grad_out_);
    rest_ = empty_f32({batch_, splits_, heads_}, grad_out_);
    TokenGradient args{.tokens = dense_.tokens,
                       .plan = plan,
                       .dtype = product_.dtype,
                       .tf32 = product_.tf32,
                       .u_grad_context = data_of(u_grad_context_),
                       .row_means = float_data(row_means_),
                       .delta = float_data(delta_),
                       .mean = float_data(a_.mean),
                       .rstd = float_data(a_.rstd),
                       .probs = float_data(a_.probs),
                       .grad_normalized = float_data(grad_normalized_),
                       .grad_u = float_data(grad_u_of_splits_),
                       .rest = float_data(rest_)};
    // Where there are more heads than a block takes, each set of them adds its part.
    Tensor earlier;
    for (args.set = 0; args.set < plan.sets; args.set++) {
      const bool last = args.set + 1 == plan.sets;
      const Tensor out = !a_.needs.patches || last ? grads_.patches : empty_f32(grads_.patches.sizes(), grad_out_);
      args.grad_patches = target_of(out);
      args.grad_aligned = out.defined() && aligned_to_16(out);
      args.earlier = float_data(earlier);
      check(cuda::token_gradient(args, stream_), "token_gradient");
      earlier = out;
    }
  }

  void query_gradient() {
    grad_u_ = splits_ > 1 ? empty_f32({batch_, heads_, width_}, grad_out_) : grad_u_of_splits_;
    grad_query_ = empty_f32({batch_, width_}, grad_out_);
    const QueryGradient args{.product = product_,
                             .grad_u_of_splits = float_data(grad_u_of_splits_),
                             .rest = float_data(rest_),
                             .key_query = float_data(a_.key_query),
                             .context = float_data(a_.context),
                             .splits = splits_,
                             .norm_weight = vector_of(a_.norm.weight),
                             .k_weight = weights_.k.const_data_ptr(),
                             .grad_u = float_data(grad_u_),
                             .grad_query = float_data(grad_query_),
                             .parts = {parts(of_heads_, 0).weight, nullptr}};
    check(cuda::query_gradient(args, stream_), "query_gradient");
  }

  void query_input_gradient() {
    grad_query_input_ = empty_f32({batch_, width_}, grad_out_);
    const QueryInputGradient args{.product = product_,
                                  .grad_query = float_data(grad_query_),
                                  .q_weight = weights_.q.const_data_ptr(),
                                  .normalized_cls = normalized_cls_,
                                  .grad_query_input = float_data(grad_query_input_),
                                  .parts = parts(2 * of_heads_, of_heads_)};
    check(cuda::query_input_gradient(args, stream_), "query_input_gradient");
  }

  void projection_gradients() {
    const ProjectionGradients args{.product = product_,
                                   .grad_out = grad_out_.const_data_ptr(),
                                   .context = float_data(a_.context),
                                   .query = float_data(a_.query),
                                   .grad_u = float_data(grad_u_),
                                   .grad_query = float_data(grad_query_),
                                   .normalized_cls = normalized_cls_,
                                   .norm_weight = vector_of(a_.norm.weight),
                                   .norm_bias = vector_of(a_.norm.bias),
                                   .grad_q_weight = data_of(grads_.q_weight),
                                   .grad_k_weight = data_of(grads_.k_weight),
                                   .grad_v_weight = data_of(grads_.v_weight)};
    check(cuda::projection_gradients(args, stream_), "projection_gradients");
  }

  void finish_gradients() {
    const FinishGradients args{.product = product_,
                               .parts = {float_data(weight_parts_), float_data(bias_parts_)},
                               .weight_rows = weight_rows_,
                               .bias_rows = bias_rows_,
                               .grad_query = float_data(grad_query_),
                               .probs = float_data(a_.probs),
                               .rest = float_data(rest_),
                               .key_query = float_data(a_.key_query),
                               .grad_normalized = float_data(grad_normalized_),
                               .grad_query_input = float_data(grad_query_input_),
                               .grad_out = grad_out_.const_data_ptr(),
                               .splits = splits_,
                               .normalized_cls = normalized_cls_,
                               .norm_weight = vector_of(a_.norm.weight),
                               .grad_cls = target_of(grads_.cls),
                               .grad_norm_weight = target_of(grads_.norm_weight),
                               .grad_norm_bias = target_of(grads_.norm_bias),
                               .grad_q_bias = target_of(grads_.q_bias),
                               .grad_v_bias = target_of(grads_.v_bias)};
    check(cuda::finish_gradients(args, stream_), "finish_gradients");
  }

  const ClsCrossAttentionBackward& a_;
  const Stream stream_;
  const int64_t batch_, heads_, width_;
  const DenseTokens dense_;
  const ProjectionWeights weights_;
  const Tensor grad_out_;  // of the weights' dtype
  const RowsProduct product_;
  const NormalizedCls normalized_cls_;
  int64_t blocks_ = 0, of_heads_ = 0, weight_rows_ = 0, bias_rows_ = 0;
  int splits_ = 1;
  Tensor u_grad_context_, row_means_, delta_, grad_normalized_, grad_u_of_splits_, rest_, grad_u_, grad_query_;
  Tensor grad_query_input_, weight_parts_, bias_parts_;
  ClsCrossAttentionGradients grads_;
};

std::vector<Tensor> cls_cross_attention_backward(const ClsCrossAttentionBackward& a, bool tf32) {
  const Call call(a.patches, tf32);
  return Backward(call, a).run();
}

const Library of_cls_cross_attention = ops().define<cls_cross_attention>().define<cls_cross_attention_backward>();

}  // namespace

}  // namespace crossvit::cuda
