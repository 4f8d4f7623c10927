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
      .out = out.mutable_data_ptr()};
  check(cls_value(value, call.stream), "cls_value");
  return {out, mean, rstd, probs, context, queries, a.save ? key_query : empty_f32({0, heads, width}, a.patches)};
}

float* floats(const Tensor& t) { return t.defined() ? t.mutable_data_ptr<float>() : nullptr; }
void* untyped(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

// What the forward saved, contiguous, in whatever backend, and in float32.
struct Saved {
  const float *mean, *rstd, *probs, *context, *query, *key_query;
  explicit Saved(const ClsCrossAttentionBackward& a)
      : mean(floats(a.mean)),
        rstd(floats(a.rstd)),
        probs(floats(a.probs)),
        context(floats(a.context)),
        query(floats(a.query)),
        key_query(floats(a.key_query)) {}
};

// The backward, a step of docs/design/cls_cross_attention.md a function. Each leaves what the steps behind it take in tensors of
// the step's names; one that is not needed is not defined.
class Backward {
 public:
  Backward(const Call& call, const ClsCrossAttentionBackward& a)
      : dense_(a.cls, a.patches, a.num_heads),
        weights_(a.q_weight, a.k_weight, a.v_weight),
        grad_out_(a.grad_out.to(weights_.q.scalar_type()).contiguous()),
        saved_(a),
        needs_(a.needs),
        norm_weight_(vector_of(a.norm.weight)),
        norm_bias_(vector_of(a.norm.bias)),
        stream_(call.stream),
        batch_(a.patches.size(0)),
        heads_(a.num_heads),
        width_(a.patches.size(2)),
        product_{dtype_of(weights_.q), call.tf32, weights_.aligned(), batch_, dense_.tokens.width, dense_.tokens.heads},
        normalized_cls_{dense_.tokens.cls,
                        dense_.tokens.cls_dtype,
                        dense_.tokens.cls_stride,
                        saved_.mean,
                        saved_.rstd,
                        static_cast<int>(1 + a.patches.size(1))} {
    const auto& needs = a.needs;
    const auto like = [&](bool needed, Sizes shape, ScalarType dtype) {
      return needed ? empty(shape, dtype, a.patches) : Tensor();
    };
    const auto matrix = weights_.q.scalar_type();
    grads_.cls = like(needs.cls, {batch_, width_}, a.cls.scalar_type());
    grads_.patches = like(needs.patches, a.patches.sizes(), a.patches.scalar_type());
    grads_.norm_weight = like(needs.norm_weight, {width_}, a.norm.weight.scalar_type());
    grads_.norm_bias = like(needs.norm_bias, {width_}, a.norm.bias ? a.norm.bias->scalar_type() : kFloat32);
    grads_.q_weight = like(needs.q_weight, {width_, width_}, matrix);
    grads_.q_bias = like(needs.q_bias, {width_}, matrix);
    grads_.k_weight = like(needs.k_weight, {width_, width_}, matrix);
    if (needs.k_bias) grads_.k_bias = zeros({width_}, matrix, a.patches.device());
    grads_.v_weight = like(needs.v_weight, {width_, width_}, matrix);
    grads_.v_bias = like(needs.v_bias, {width_}, matrix);
    // The rows of NormParts: of value_gradient, query_gradient (the weight's alone) and query_input_gradient.
    blocks_ = (batch_ + 15) / 16;
    of_heads_ = blocks_ * heads_;
    weight_rows_ = 2 * of_heads_ + blocks_;
    bias_rows_ = of_heads_ + blocks_;
  }

  std::vector<Tensor> run() {
    const bool to_query_input = needs_.cls || needs_.norm_weight || needs_.norm_bias;
    const bool to_query = to_query_input || needs_.q_weight || needs_.q_bias || needs_.k_weight;
    if (to_query || needs_.patches) {
      if (needs_.norm_weight) weight_parts_ = empty_f32({weight_rows_, width_}, grad_out_);
      if (needs_.norm_bias) bias_parts_ = empty_f32({bias_rows_, width_}, grad_out_);
      value_gradient();
      token_gradient();
    }
    if (to_query) query_gradient();
    if (to_query_input) query_input_gradient();
    if (needs_.q_weight || needs_.k_weight || needs_.v_weight) projection_gradients();
    if (to_query_input || needs_.q_bias || needs_.v_bias) finish_gradients();
    return grads_.in_order();
  }

 private:
  NormParts parts(int64_t weight_row, int64_t bias_row) const {
    return {weight_parts_.defined() ? floats(weight_parts_) + weight_row * width_ : nullptr,
            bias_parts_.defined() ? floats(bias_parts_) + bias_row * width_ : nullptr};
  }

  void value_gradient() {
    u_grad_context_ = empty({batch_, heads_, 2, width_}, weights_.q.scalar_type(), grad_out_);
    row_means_ = empty_f32({batch_, heads_, 2}, grad_out_);
    delta_ = empty_f32({batch_, heads_}, grad_out_);
    const ValueGradient args{.product = product_,
                             .grad_out = grad_out_.const_data_ptr(),
                             .v_weight = weights_.v.const_data_ptr(),
                             .key_query = saved_.key_query,
                             .context = saved_.context,
                             .norm_weight = norm_weight_,
                             .u_grad_context = untyped(u_grad_context_),
                             .row_means = floats(row_means_),
                             .delta = floats(delta_),
                             .parts = parts(0, 0)};
    check(cuda::value_gradient(args, stream_), "value_gradient");
  }

  void token_gradient() {
    const TokenPlan plan = plan_token_gradient(dense_.tokens, product_.dtype);
    check_width(plan.shared, width_);
    splits_ = plan.splits;
    if (needs_.cls) grad_normalized_ = empty_f32({batch_, width_}, grad_out_);
    grad_u_of_splits_ = empty_f32({batch_, splits_, heads_, width_}, grad_out_);
    rest_ = empty_f32({batch_, splits_, heads_}, grad_out_);
    TokenGradient args{.tokens = dense_.tokens,
                       .plan = plan,
                       .dtype = product_.dtype,
                       .tf32 = product_.tf32,
                       .u_grad_context = untyped(u_grad_context_),
                       .row_means = floats(row_means_),
                       .delta = floats(delta_),
                       .mean = saved_.mean,
                       .rstd = saved_.rstd,
                       .probs = saved_.probs,
                       .grad_normalized = floats(grad_normalized_),
                       .grad_u = floats(grad_u_of_splits_),
                       .rest = floats(rest_)};
    // Where there are more heads than a block takes, each set of them adds its part.
    Tensor earlier;
    for (args.set = 0; args.set < plan.sets; args.set++) {
      const bool last = args.set + 1 == plan.sets;
      const Tensor out = !needs_.patches || last ? grads_.patches : empty_f32(grads_.patches.sizes(), grad_out_);
      args.grad_patches = target_of(out);
      args.grad_aligned = out.defined() && aligned_to_16(out);
      args.earlier = floats(earlier);
      check(cuda::token_gradient(args, stream_), "token_gradient");
      earlier = out;
    }
  }

  void query_gradient() {
    grad_u_ = splits_ > 1 ? empty_f32({batch_, heads_, width_}, grad_out_) : grad_u_of_splits_;
    grad_query_ = empty_f32({batch_, width_}, grad_out_);
    const QueryGradient args{.product = product_,
                             .grad_u_of_splits = floats(grad_u_of_splits_),
                             .rest = floats(rest_),
                             .key_query = saved_.key_query,
                             .context = saved_.context,
                             .splits = splits_,
                             .norm_weight = norm_weight_,
                             .k_weight = weights_.k.const_data_ptr(),
                             .grad_u = floats(grad_u_),
                             .grad_query = floats(grad_query_),
                             .parts = {parts(of_heads_, 0).weight, nullptr}};
    check(cuda::query_gradient(args, stream_), "query_gradient");
  }

  void query_input_gradient() {
    grad_query_input_ = empty_f32({batch_, width_}, grad_out_);
    const QueryInputGradient args{.product = product_,
                                  .grad_query = floats(grad_query_),
                                  .q_weight = weights_.q.const_data_ptr(),
                                  .normalized_cls = normalized_cls_,
                                  .grad_query_input = floats(grad_query_input_),
                                  .parts = parts(2 * of_heads_, of_heads_)};
    check(cuda::query_input_gradient(args, stream_), "query_input_gradient");
  }

  void projection_gradients() {
    const ProjectionGradients args{.product = product_,
                                   .grad_out = grad_out_.const_data_ptr(),
                                   .context = saved_.context,
                                   .query = saved_.query,
                                   .grad_u = floats(grad_u_),
                                   .grad_query = floats(grad_query_),
                                   .normalized_cls = normalized_cls_,
                                   .norm_weight = norm_weight_,
                                   .norm_bias = norm_bias_,
                                   .grad_q_weight = untyped(grads_.q_weight),
                                   .grad_k_weight = untyped(grads_.k_weight),
                                   .grad_v_weight = untyped(grads_.v_weight)};
    check(cuda::projection_gradients(args, stream_), "projection_gradients");
  }

  void finish_gradients() {
    const FinishGradients args{.product = product_,
                               .parts = {floats(weight_parts_), floats(bias_parts_)},
                               .weight_rows = weight_rows_,
                               .bias_rows = bias_rows_,
                               .grad_query = floats(grad_query_),
                               .probs = saved_.probs,
                               .rest = floats(rest_),
                               .key_query = saved_.key_query,
                               .grad_normalized = floats(grad_normalized_),
                               .grad_query_input = floats(grad_query_input_),
                               .grad_out = grad_out_.const_data_ptr(),
                               .splits = splits_,
                               .normalized_cls = normalized_cls_,
                               .norm_weight = norm_weight_,
                               .grad_cls = target_of(grads_.cls),
                               .grad_norm_weight = target_of(grads_.norm_weight),
                               .grad_norm_bias = target_of(grads_.norm_bias),
                               .grad_q_bias = target_of(grads_.q_bias),
                               .grad_v_bias = target_of(grads_.v_bias)};
    check(cuda::finish_gradients(args, stream_), "finish_gradients");
  }

  const DenseTokens dense_;
  const ProjectionWeights weights_;
  const Tensor grad_out_;  // of the weights' dtype
  const Saved saved_;
  const ClsCrossAttentionNeeds needs_;
  const Vector norm_weight_, norm_bias_;
  const Stream stream_;
  const int64_t batch_, heads_, width_;
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
