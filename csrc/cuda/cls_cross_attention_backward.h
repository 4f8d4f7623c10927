// What the kernels of cls_cross_attention's backward take, in the order of its steps; as cls_cross_attention.h.
#pragma once

#include "cuda/cls_cross_attention.h"

namespace crossvit::cuda {

// The norm's gradients come as rows, one for 16 images and a head or 16 images, which are added last; null where not needed.
struct NormParts {
  float *weight, *bias;
};

// What the steps that have a row per image have in common.
struct RowsProduct {
  DType dtype;         // of the matrix operands
  bool tf32, aligned;  // aligned: the rows of all weights, and every head's columns, begin at multiples of 16 bytes
  std::int64_t batch;
  int width, heads;
};

// grad_value g_h = W_v,h^T dout_h, and of it what TokenGradient takes. The parts are g z and g.
struct ValueGradient {
  RowsProduct product;
  const void *grad_out, *v_weight;  // (batch, width) of `dtype`
  const float *key_query, *context;
  Vector norm_weight;
  void* u_grad_context;
  float *row_means, *delta;
  NormParts parts;
};
Error value_gradient(const ValueGradient& args, Stream stream);

TokenPlan plan_token_gradient(const Tokens& tokens, DType dtype);

// With dz_h = gamma W_v,h^T dout_h and delta_h = dz_h . z_h
//     ds_hn = p_hn (dz_h . x^_n - delta_h)
//     grad_u = sum_n ds_hn x^_n, rest = sum_n ds_hn     of a split's tokens
//     dx^_n = sum_h ds_hn u_h + p_hn dz_h               through the LayerNorm into grad_patches, for the CLS token as it is
struct TokenGradient {
  Tokens tokens;
  TokenPlan plan;
  DType dtype;
  bool tf32;
  int set;                     // of plan.sets, one launch after the other
  const void* u_grad_context;  // (batch, heads, 2, width) of `dtype`: u_h and dz_h
  const float* row_means;      // (batch, heads, 2): the means of these rows
  const float* delta;          // (batch, heads)
  const float *mean, *rstd;    // (batch, 1 + patches)
  const float* probs;          // (batch, heads, 1 + patches)
  Target grad_patches;     // (batch, patches, width), contiguous; float32 where `earlier` is read or later sets follow
  bool grad_aligned;       // its rows begin at multiples of 16 bytes, and its width is one
  const float* earlier;    // of the sets before, or null
  float* grad_normalized;  // (batch, width), or null; sets after the first add to it
  float *grad_u, *rest;    // (batch, splits, heads, width), (batch, splits, heads)
};
Error token_gradient(const TokenGradient& args, Stream stream);

// grad_u, joined from the splits and freed of what rounding left of sum_n ds_n, and the query's gradient
// W_k,h (gamma du_h) / sqrt(d). The parts are du_h key_query_h.
struct QueryGradient {
  RowsProduct product;
  const float *grad_u_of_splits, *rest;  // (batch, splits, heads, width), (batch, splits, heads)
  const float *key_query, *context;
  int splits;
  Vector norm_weight;
  const void* k_weight;
  float* grad_u;      // (batch, heads, width); may be `grad_u_of_splits` where splits == 1
  float* grad_query;  // (batch, width)
  NormParts parts;
};
Error query_gradient(const QueryGradient& args, Stream stream);

// The normalized CLS tokens x^_0, as what they are made of.
struct NormalizedCls {
  const void* cls;
  DType dtype;
  std::int64_t stride;
  const float *mean, *rstd;  // (batch, tokens)
  int tokens;
};

// grad_query_input dy_0 = W_q^T dq. The parts are dy_0 x^_0 and dy_0.
struct QueryInputGradient {
  RowsProduct product;
  const float* grad_query;
  const void* q_weight;
  NormalizedCls normalized_cls;
  float* grad_query_input;
  NormParts parts;
};
Error query_input_gradient(const QueryInputGradient& args, Stream stream);

// dW_q = sum_b dq y_0^T, dW_k,h = sum_b q_h scale (gamma du_h)^T, dW_v,h = sum_b dout_h (gamma z_h + beta)^T, of `dtype`; null
// where not needed.
struct ProjectionGradients {
  RowsProduct product;
  const void* grad_out;
  const float *context, *query, *grad_u, *grad_query;
  NormalizedCls normalized_cls;
  Vector norm_weight, norm_bias;
  void *grad_q_weight, *grad_k_weight, *grad_v_weight;
};
Error projection_gradients(const ProjectionGradients& args, Stream stream);

// What is left: sums over rows, and the gradient of cls.
struct FinishGradients {
  RowsProduct product;
  NormParts parts;
  std::int64_t weight_rows, bias_rows;
  const float *grad_query, *probs, *rest, *key_query, *grad_normalized, *grad_query_input;
  const void* grad_out;
  int splits;
  NormalizedCls normalized_cls;
  Vector norm_weight;
  Target grad_cls, grad_norm_weight, grad_norm_bias, grad_q_bias, grad_v_bias;
};
Error finish_gradients(const FinishGradients& args, Stream stream);

}  // namespace crossvit::cuda
