// cls_fusion on CUDA tensors, in four launches: projection, query and absorbed key; one pass over the tokens; every head's
// value and share of the output; their sum and the way back.
#include "cuda/cls_fusion.h"

#include "cuda/cls_tensors.h"

namespace crossvit::cuda {

namespace {

Tensor cls_fusion(const ClsFusion& a, bool tf32) {
  const Call call(a.patches, tf32);
  const int64_t batch = a.patches.size(0), width = a.patches.size(2), own_width = a.cls.size(1);
  const Tensor own = dense_rows(a.cls);
  const ProjectionWeights projections(a.q.weight, a.k_weight, a.v.weight);
  const Tensor into = a.proj.weight.contiguous(), output = a.out.weight.contiguous();
  const Tensor back = a.revert.weight.contiguous();
  const bool aligned = projections.aligned() && aligned_to_16(into) && aligned_to_16(output) && aligned_to_16(back);

  // The CLS stays in float32 between the steps, whatever the model's dtype.
  const Tensor projected = empty_f32({batch, width}, a.patches);
  const DenseTokens dense(projected, a.patches, a.num_heads);
  const Tensor key_query = empty_f32({batch, a.num_heads, width}, a.patches);
  FusionQuery query{.cls = own.const_data_ptr(),
                    .cls_dtype = dtype_of(own),
                    .cls_stride = own.stride(0),
                    .own_width = static_cast<int>(own_width),
                    .norm_weight = vector_of(a.proj_norm.weight),
                    .norm_bias = vector_of(a.proj_norm.bias),
                    .bias = vector_of(a.proj.bias),
                    .weight = into.const_data_ptr(),
                    .aligned = aligned,
                    .projected = float_data(projected),
                    .query = query_of(call, dense, a.norm, a.q.bias, projections, aligned, a.eps)};
  query.query.key_query = float_data(key_query);
  check(fusion_query(query, call.stream), "fusion_query");

  const SplitResults of_splits(dense, query.query);
  const TokenPass& pass = of_splits.pass;
  check(token_pass(pass, call.stream), "token_pass");

  const Tensor of_heads = empty_f32({batch, a.num_heads, width}, a.patches);
  const FusionValue value{.contexts = {pass.context, pass.softmax, pass.plan.splits, nullptr},
                          .batch = batch,
                          .width = dense.tokens.width,
                          .heads = dense.tokens.heads,
                          .norm_weight = query.query.norm_weight,
                          .norm_bias = query.query.norm_bias,
                          .v_bias = vector_of(a.v.bias),
                          .v_weight = projections.v.const_data_ptr(),
                          .out_weight = output.const_data_ptr(),
                          .dtype = query.query.dtype,
                          .tf32 = tf32,
                          .aligned = aligned,
                          .heads_aligned = aligned && width / a.num_heads * a.q.weight.itemsize() % 16 == 0,
                          .out = float_data(of_heads)};
  check(fusion_value(value, call.stream), "fusion_value");

  const Tensor out = empty({batch, own_width}, a.revert.weight.scalar_type(), a.patches);
  const FusionRevert revert{.heads_out = value.out,
                            .projected = query.projected,
                            .batch = batch,
                            .width = value.width,
                            .heads = value.heads,
                            .own_width = query.own_width,
                            .out_bias = vector_of(a.out.bias),
                            .norm_weight = vector_of(a.revert_norm.weight),
                            .norm_bias = vector_of(a.revert_norm.bias),
                            .bias = vector_of(a.revert.bias),
                            .weight = back.const_data_ptr(),
                            .dtype = value.dtype,
                            .tf32 = tf32,
                            .aligned = aligned,
                            .eps = query.query.eps,
                            .out = out.data_ptr()};
  check(fusion_revert(revert, call.stream), "fusion_revert");
  return out;
}

const Library of_cls_fusion = ops().define<cls_fusion>();

}  // namespace

}  // namespace crossvit::cuda
