// What cls_cross_attention's gradient does with one row per image; as cls_cross_attention.h.
#pragma once

#include "cuda/cls_cross_attention.h"

namespace crossvit::cuda {

// The norm's gradients come as rows, one for 16 images and a head or 16 images, which are added last; null where not needed.
struct NormParts {
  float *weight, *bias;
};

// g = W_v,h^T dout_h, and of it pairs, means and delta as TokenGradient takes them. Parts: g z and g.
struct ValueGradient {
  const void *grad_out, *v_weight;  // (batch, width) of `type`
  const float *key_query, *context;
  Vector norm_weight;
  Type type;
  bool tf32, aligned;
  std::int64_t batch;
  int width, heads;
  void* pairs;
  float *means, *delta;
  NormParts parts;
};
Error value_gradient(const ValueGradient& args, Stream stream);

// t_h, joined from the splits and freed of what rounding left of sum_n ds_n, and the query's gradient W_k,h (gamma t_h)
// scale. Parts: t_h key_query_h.
struct QueryGradient {
  const float *partial, *rests;  // (batch, splits, heads, width), (batch, splits, heads)
  const float *key_query, *context;
  int splits;
  Vector norm_weight;
  const void* k_weight;
  Type type;
  bool tf32, aligned;
  std::int64_t batch;
  int width, heads;
  float* sums;        // (batch, heads, width); may be `partial` where splits == 1
  float* grad_query;  // (batch, width)
  NormParts parts;
};
Error query_gradient(const QueryGradient& args, Stream stream);

// The normalised CLS tokens x^_0.
struct FirstTokens {
  const void* cls;
  Type type;
  std::int64_t stride;
  const float *mean, *rstd;  // (batch, tokens)
  int tokens;
};

// dy_0 = W_q^T dquery. Parts: dy_0 x^_0 and dy_0.
struct QueryInputGradient {
  const float* grad_query;
  const void* q_weight;
  FirstTokens first;
  Type type;
  bool tf32, aligned;
  std::int64_t batch;
  int width;
  float* grad_input;
  NormParts parts;
};
Error query_input_gradient(const QueryInputGradient& args, Stream stream);

// dW_q = sum_b dq y_0^T, dW_k,h = sum_b q_h scale (gamma t_h)^T, dW_v,h = sum_b dout_h (gamma z_h + beta)^T, of `type`; null
// where not needed.
struct WeightGradients {
  const void* grad_out;
  const float *context, *query, *sums, *grad_query;
  FirstTokens first;
  Vector norm_weight, norm_bias;
  Type type;
  bool tf32;
  std::int64_t batch;
  int width, heads;
  void *q_weight, *k_weight, *v_weight;
};
Error weight_gradients(const WeightGradients& args, Stream stream);

// What is left: sums over rows, and the gradient of cls. Null where not needed.
struct FinishGradients {
  NormParts parts;
  std::int64_t weight_rows, bias_rows;
  const float *grad_query, *probs, *rests, *key_query, *grad_normalized, *grad_input;
  const void* grad_out;
  Type type;  // of grad_out
  int splits;
  FirstTokens first;
  Vector norm_weight;
  std::int64_t batch;
  int width, heads;
  void *norm_weight_out, *norm_bias_out, *q_bias, *v_bias, *cls;
  Type norm_weight_type, norm_bias_type, q_bias_type, v_bias_type, cls_type;
};
Error finish_gradients(const FinishGradients& args, Stream stream);

}  // namespace crossvit::cuda
