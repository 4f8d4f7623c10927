// What cls_fusion's kernels take beside those of cls_cross_attention, in the names of crossvit_kernels/ops/cls_fusion.py.
#pragma once

#include "cuda/cls_cross_attention.h"

namespace crossvit::cuda {

// projected = W_f gelu(LayerNorm(cls)) + b_f, and its query and key_query. `query.cls` is `projected` (batch, width), dense
// and float32.
struct FusionQuery {
  const void* cls;  // (batch, own_width), rows cls_stride apart
  DType cls_dtype;
  std::int64_t cls_stride;
  int own_width;
  Vector norm_weight, norm_bias, bias;
  const void* weight;
  bool aligned;
  float* projected;
  ClsQuery query;
};
Error fusion_query(const FusionQuery& args, Stream stream);

// Every head's share of the output, W_o[:, h] (W_v,h (gamma z_h + beta) + b_v,h), is to be added up: (batch, heads, width).
struct FusionValue {
  SplitContexts contexts;
  std::int64_t batch;
  int width, heads;
  Vector norm_weight, norm_bias, v_bias;
  const void *v_weight, *out_weight;
  DType dtype;
  bool tf32, aligned, heads_aligned;  // heads_aligned: so are a head's columns of W_o
  float* out;
};
Error fusion_value(const FusionValue& args, Stream stream);

// W_g gelu(LayerNorm(projected + b_o + the heads' sum)) + b_g.
struct FusionRevert {
  const float *heads_out, *projected;
  std::int64_t batch;
  int width, heads, own_width;
  Vector out_bias, norm_weight, norm_bias, bias;
  const void* weight;
  DType dtype;
  bool tf32, aligned;
  float eps;
  void* out;  // (batch, own_width), of `dtype`
};
Error fusion_revert(const FusionRevert& args, Stream stream);

}  // namespace crossvit::cuda
