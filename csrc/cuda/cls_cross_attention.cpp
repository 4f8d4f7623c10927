// cls_cross_attention on CUDA tensors: query and absorbed key, one pass over the tokens, value.
#include "cuda/cls_cross_attention.h"

#include <tuple>
#include <vector>

#include "cuda/check.h"
#include "cuda/cls_cross_attention_backward.h"
#include "cuda/cls_tensors.h"

namespace crossvit::cuda {

using CrossAttentionResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

CrossAttentionResult cls_cross_attention(const Tensor& cls, const Tensor& patches, const Tensor& norm_weight,
                                         const OptionalTensor& norm_bias, const Tensor& q_weight,
                                         const OptionalTensor& q_bias, const Tensor& k_weight, const Tensor& v_weight,
                                         const OptionalTensor& v_bias, int64_t num_heads, double eps, bool save,
                                         bool tf32) {
  arguments::cls_cross_attention(taken(), cls, patches, norm_weight, norm_bias, q_weight, q_bias, k_weight, v_weight,
                                 v_bias, num_heads, eps);
  const Call call(patches, tf32);
  const int64_t batch = patches.size(0), tokens = 1 + patches.size(1), width = patches.size(2);
  const int64_t kept = save ? batch : 0;
  const DenseTokens dense(cls, patches, num_heads);
  const ProjectionWeights weights(q_weight, k_weight, v_weight);

  ClsQuery query = query_of(call, dense, norm_weight, norm_bias, q_bias, weights, weights.aligned(), eps);
  const Tensor queries = empty_f32({kept, width}, patches);
  const Tensor key_query = empty_f32({batch, num_heads, width}, patches);
  if (save) query.query = queries.mutable_data_ptr<float>();
  query.key_query = key_query.mutable_data_ptr<float>();
  check(cls_query(query, call.stream), "cls_query");

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
  check(token_pass(pass, call.stream), "token_pass");

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
  value.v_bias = vector_of(v_bias);
  value.v_weight = weights.v.const_data_ptr();
  value.dtype = query.dtype;
  value.tf32 = query.tf32;
  value.aligned = query.aligned;
  value.out = out.mutable_data_ptr();
  check(cls_value(value, call.stream), "cls_value");
  return {out, mean, rstd, probs, context, queries, save ? key_query : empty_f32({0, num_heads, width}, patches)};
}

namespace {

float* floats(const Tensor& t) { return t.defined() ? t.mutable_data_ptr<float>() : nullptr; }
void* untyped(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }
Target target(const Tensor& t) { return t.defined() ? Target{untyped(t), dtype_of(t)} : Target{}; }

// What the forward saved, contiguous and in float32.
struct Saved {
  const float *mean, *rstd, *probs, *context, *query, *key_query;
};

// The backward, a step of docs/design/cls_cross_attention.md a function. Each leaves what the steps behind it take in tensors of
// the step's names; one that is not needed is not defined.
class Backward {
 public:
  Backward(const Call& call, const Tensor& grad_out, const Tensor& cls, const Tensor& patches,
           const Tensor& norm_weight, const OptionalTensor& norm_bias, const ProjectionWeights& weights,
           const Saved& saved, int64_t num_heads, const ClsCrossAttentionNeeds& needs)
      : dense_(cls, patches, num_heads),
        weights_(weights),
        grad_out_(grad_out.to(weights.q.scalar_type()).contiguous()),
        saved_(saved),
        needs_(needs),
        norm_weight_(vector_of(norm_weight)),
        norm_bias_(vector_of(norm_bias)),
        stream_(call.stream),
        batch_(patches.size(0)),
        heads_(num_heads),
        width_(patches.size(2)),
        type_(dtype_of(weights.q)),
        tf32_(call.tf32),
        aligned_(weights.aligned()),
        normalized_cls_{dense_.tokens.cls,
                        dense_.tokens.cls_dtype,
                        dense_.tokens.cls_stride,
                        saved.mean,
                        saved.rstd,
                        static_cast<int>(1 + patches.size(1))} {
    const auto like = [&](bool needed, Sizes shape, ScalarType dtype) {
      return needed ? empty(shape, dtype, patches) : Tensor();
    };
    const auto matrix = weights.q.scalar_type();
    grads_.cls = like(needs.cls, {batch_, width_}, cls.scalar_type());
    grads_.patches = like(needs.patches, patches.sizes(), patches.scalar_type());
    grads_.norm_weight = like(needs.norm_weight, {width_}, norm_weight.scalar_type());
    grads_.norm_bias = like(needs.norm_bias, {width_}, norm_bias ? norm_bias->scalar_type() : kFloat32);
    grads_.q_weight = like(needs.q_weight, {width_, width_}, matrix);
    grads_.q_bias = like(needs.q_bias, {width_}, matrix);
    grads_.k_weight = like(needs.k_weight, {width_, width_}, matrix);
    if (needs.k_bias) grads_.k_bias = zeros({width_}, matrix, patches.device());
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
  // What the arguments of all steps but token_gradient have in common.
  template <class Args>
  Args rows_args() const {
    Args args{};
    args.norm_weight = norm_weight_;
    args.dtype = type_;
    args.batch = batch_;
    args.width = static_cast<int>(width_);
    args.heads = static_cast<int>(heads_);
    return args;
  }
  NormParts parts(int64_t weight_row, int64_t bias_row) const {
    return {weight_parts_.defined() ? floats(weight_parts_) + weight_row * width_ : nullptr,
            bias_parts_.defined() ? floats(bias_parts_) + bias_row * width_ : nullptr};
  }

  void value_gradient() {
    u_grad_context_ = empty({batch_, heads_, 2, width_}, weights_.q.scalar_type(), grad_out_);
    row_means_ = empty_f32({batch_, heads_, 2}, grad_out_);
    delta_ = empty_f32({batch_, heads_}, grad_out_);
    auto args = rows_args<ValueGradient>();
    args.grad_out = grad_out_.const_data_ptr();
    args.v_weight = weights_.v.const_data_ptr();
    args.key_query = saved_.key_query;
    args.context = saved_.context;
    args.tf32 = tf32_;
    args.aligned = aligned_;
    args.u_grad_context = untyped(u_grad_context_);
    args.row_means = floats(row_means_);
    args.delta = floats(delta_);
    args.parts = parts(0, 0);
    check(cuda::value_gradient(args, stream_), "value_gradient");
  }

  void token_gradient() {
    TokenGradient args{};
    args.tokens = dense_.tokens;
    args.plan = plan_token_gradient(dense_.tokens, type_);
    check_width(args.plan.shared, width_);
    splits_ = args.plan.splits;
    args.dtype = type_;
    args.tf32 = tf32_;
    args.u_grad_context = untyped(u_grad_context_);
    args.row_means = floats(row_means_);
    args.delta = floats(delta_);
    args.mean = saved_.mean;
    args.rstd = saved_.rstd;
    args.probs = saved_.probs;
    if (needs_.cls) grad_normalized_ = empty_f32({batch_, width_}, grad_out_);
    args.grad_normalized = floats(grad_normalized_);
    grad_u_of_splits_ = empty_f32({batch_, splits_, heads_, width_}, grad_out_);
    rest_ = empty_f32({batch_, splits_, heads_}, grad_out_);
    args.grad_u = floats(grad_u_of_splits_);
    args.rest = floats(rest_);
    // Where there are more heads than a block takes, each set of them adds its part.
    Tensor earlier;
    for (args.set = 0; args.set < args.plan.sets; args.set++) {
      const bool last = args.set + 1 == args.plan.sets;
      const Tensor out = !needs_.patches || last ? grads_.patches : empty_f32(grads_.patches.sizes(), grad_out_);
      args.grad_patches = untyped(out);
      args.earlier = floats(earlier);
      if (out.defined()) {
        args.grad_dtype = dtype_of(out);
        args.grad_aligned = aligned_to_16(out);
      }
      check(cuda::token_gradient(args, stream_), "token_gradient");
      earlier = out;
    }
  }

  void query_gradient() {
    grad_u_ = splits_ > 1 ? empty_f32({batch_, heads_, width_}, grad_out_) : grad_u_of_splits_;
    grad_query_ = empty_f32({batch_, width_}, grad_out_);
    auto args = rows_args<QueryGradient>();
    args.grad_u_of_splits = floats(grad_u_of_splits_);
    args.rest = floats(rest_);
    args.key_query = saved_.key_query;
    args.context = saved_.context;
    args.splits = splits_;
    args.k_weight = weights_.k.const_data_ptr();
    args.tf32 = tf32_;
    args.aligned = aligned_;
    args.grad_u = floats(grad_u_);
    args.grad_query = floats(grad_query_);
    args.parts = {parts(of_heads_, 0).weight, nullptr};
    check(cuda::query_gradient(args, stream_), "query_gradient");
  }

  void query_input_gradient() {
    grad_query_input_ = empty_f32({batch_, width_}, grad_out_);
    QueryInputGradient args{};
    args.grad_query = floats(grad_query_);
    args.q_weight = weights_.q.const_data_ptr();
    args.normalized_cls = normalized_cls_;
    args.dtype = type_;
    args.tf32 = tf32_;
    args.aligned = aligned_;
    args.batch = batch_;
    args.width = static_cast<int>(width_);
    args.grad_query_input = floats(grad_query_input_);
    args.parts = parts(2 * of_heads_, of_heads_);
    check(cuda::query_input_gradient(args, stream_), "query_input_gradient");
  }

  void projection_gradients() {
    auto args = rows_args<ProjectionGradients>();
    args.grad_out = grad_out_.const_data_ptr();
    args.context = saved_.context;
    args.query = saved_.query;
    args.grad_u = floats(grad_u_);
    args.grad_query = floats(grad_query_);
    args.normalized_cls = normalized_cls_;
    args.norm_bias = norm_bias_;
    args.tf32 = tf32_;
    args.grad_q_weight = untyped(grads_.q_weight);
    args.grad_k_weight = untyped(grads_.k_weight);
    args.grad_v_weight = untyped(grads_.v_weight);
    check(cuda::projection_gradients(args, stream_), "projection_gradients");
  }

  void finish_gradients() {
    auto args = rows_args<FinishGradients>();
    args.parts = {floats(weight_parts_), floats(bias_parts_)};
    args.weight_rows = weight_rows_;
    args.bias_rows = bias_rows_;
    args.grad_query = floats(grad_query_);
    args.probs = saved_.probs;
    args.rest = floats(rest_);
    args.key_query = saved_.key_query;
    args.grad_normalized = floats(grad_normalized_);
    args.grad_query_input = floats(grad_query_input_);
    args.grad_out = grad_out_.const_data_ptr();
    args.splits = splits_;
    args.normalized_cls = normalized_cls_;
    args.grad_cls = target(grads_.cls);
    args.grad_norm_weight = target(grads_.norm_weight);
    args.grad_norm_bias = target(grads_.norm_bias);
    args.grad_q_bias = target(grads_.q_bias);
    args.grad_v_bias = target(grads_.v_bias);
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
  const DType type_;
  const bool tf32_, aligned_;
  const NormalizedCls normalized_cls_;
  int64_t blocks_ = 0, of_heads_ = 0, weight_rows_ = 0, bias_rows_ = 0;
  int splits_ = 1;
  Tensor u_grad_context_, row_means_, delta_, grad_normalized_, grad_u_of_splits_, rest_, grad_u_, grad_query_;
  Tensor grad_query_input_, weight_parts_, bias_parts_;
  ClsCrossAttentionGradients grads_;
};

}  // namespace

std::vector<Tensor> cls_cross_attention_backward(const Tensor& grad_out, const Tensor& cls, const Tensor& patches,
                                                 const Tensor& norm_weight, const OptionalTensor& norm_bias,
                                                 const Tensor& q_weight, const Tensor& k_weight, const Tensor& v_weight,
                                                 const Tensor& mean, const Tensor& rstd, const Tensor& probs,
                                                 const Tensor& context, const Tensor& query, const Tensor& key_query,
                                                 int64_t num_heads, NeedsList list, bool tf32) {
  const auto needs = arguments::cls_cross_attention_backward(taken(), grad_out, cls, patches, norm_weight, norm_bias,
                                                             q_weight, k_weight, v_weight, mean, rstd, probs, context,
                                                             query, key_query, num_heads, list);
  const Call call(patches, tf32);
  // The saved tensors of other backends are contiguous, too.
  const auto data = [](const Tensor& t) { return t.const_data_ptr<float>(); };
  const Saved saved{data(mean), data(rstd), data(probs), data(context), data(query), data(key_query)};
  Backward backward(call, grad_out, cls, patches, norm_weight, norm_bias,
                    ProjectionWeights(q_weight, k_weight, v_weight), saved, num_heads, needs);
  return backward.run();
}

const Library of_cls_cross_attention =
    ops()
        .define<cls_cross_attention>(schema::cls_cross_attention.cuda())
        .define<cls_cross_attention_backward>(schema::cls_cross_attention_backward.cuda());

}  // namespace crossvit::cuda
