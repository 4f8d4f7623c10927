// The tokens' part of cls_cross_attention's gradient; as cls_cross_attention.h.
#pragma once

#include "cuda/cls_cross_attention.h"

namespace crossvit::cuda {

TokenPlan plan_token_gradient(const Tokens& tokens, Type type);

// With dz_h = gamma W_v,h^T dout_h and delta_h = dz_h . z_h
//     ds_hn = p_hn (dz_h . x^_n - delta_h)
//     grad_u = sum_n ds_hn x^_n, rest = sum_n ds_hn     of a split's tokens
//     dx^_n = sum_h ds_hn u_h + p_hn dz_h               through the LayerNorm into grad_patches, for the CLS token as it is
struct TokenGradient {
  Tokens tokens;
  TokenPlan plan;
  Type type;
  bool tf32;
  int set;                     // of plan.sets, one launch after the other
  const void* u_grad_context;  // (batch, heads, 2, width) of `type`: u_h and dz_h
  const float* row_means;      // (batch, heads, 2): the means of these rows
  const float* delta;          // (batch, heads)
  const float *mean, *rstd;    // (batch, 1 + patches)
  const float* probs;          // (batch, heads, 1 + patches)
  void* grad_patches;          // (batch, patches, width), contiguous, or null
  Type grad_type;              // where `earlier` is read or later sets follow, float32
  bool grad_aligned;           // its rows begin at multiples of 16 bytes, and its width is one
  const float* earlier;        // of the sets before, or null
  float* grad_normalized;      // (batch, width), or null; sets after the first add to it
  float *grad_u, *rest;        // (batch, splits, heads, width), (batch, splits, heads)
};
Error token_gradient(const TokenGradient& args, Stream stream);

}  // namespace crossvit::cuda
