// cls_fusion on CUDA tensors, in four launches: projection, query and absorbed key; one pass over the tokens; every head's
// value and share of the output; their sum and the way back.
#include "cuda/cls_fusion.h"

#include "cuda/check.h"
#include "cuda/cls_tensors.h"

namespace crossvit::cuda {

Tensor cls_fusion(const Tensor& cls, const Tensor& patches, const Tensor& proj_norm_weight,
                  const OptionalTensor& proj_norm_bias, const Tensor& proj_weight, const OptionalTensor& proj_bias,
                  const Tensor& norm_weight, const OptionalTensor& norm_bias, const Tensor& q_weight,
                  const OptionalTensor& q_bias, const Tensor& k_weight, const Tensor& v_weight,
                  const OptionalTensor& v_bias, const Tensor& out_weight, const OptionalTensor& out_bias,
                  const Tensor& revert_norm_weight, const OptionalTensor& revert_norm_bias, const Tensor& revert_weight,
                  const OptionalTensor& revert_bias, int64_t num_heads, double eps, bool tf32) {
  arguments::cls_fusion(taken(), cls, patches, proj_norm_weight, proj_norm_bias, proj_weight, proj_bias, norm_weight,
                        norm_bias, q_weight, q_bias, k_weight, v_weight, v_bias, out_weight, out_bias,
                        revert_norm_weight, revert_norm_bias, revert_weight, revert_bias, num_heads, eps);
  const Call call(patches, tf32);
  const int64_t batch = patches.size(0), width = patches.size(2), own_width = cls.size(1), head = width / num_heads;
  const Tensor own = dense_rows(cls);
  const ProjectionWeights projections(q_weight, k_weight, v_weight);
  const Tensor into = proj_weight.contiguous(), output = out_weight.contiguous(), back = revert_weight.contiguous();
  const bool aligned = projections.aligned() && aligned_to_16(into) && aligned_to_16(output) && aligned_to_16(back);
  const DType dtype = dtype_of(q_weight);

  // The CLS stays in float32 between the steps, whatever the model's dtype.
  const Tensor projected = empty_f32({batch, width}, patches);
  const DenseTokens dense(projected, patches, num_heads);
  const Tensor key_query = empty_f32({batch, num_heads, width}, patches);
  FusionQuery query{};
  query.cls = own.const_data_ptr();
  query.cls_dtype = dtype_of(own);
  query.cls_stride = own.stride(0);
  query.own_width = static_cast<int>(own_width);
  query.norm_weight = vector_of(proj_norm_weight);
  query.norm_bias = vector_of(proj_norm_bias);
  query.bias = vector_of(proj_bias);
  query.weight = into.const_data_ptr();
  query.aligned = aligned;
  query.projected = projected.mutable_data_ptr<float>();
  query.query = query_of(call, dense, norm_weight, norm_bias, q_bias, projections, aligned, eps);
  query.query.key_query = key_query.mutable_data_ptr<float>();
  check(fusion_query(query, call.stream), "fusion_query");

  const SplitResults of_splits(dense, query.query);
  const TokenPass& pass = of_splits.pass;
  check(token_pass(pass, call.stream), "token_pass");

  const Tensor of_heads = empty_f32({batch, num_heads, width}, patches);
  FusionValue value{};
  value.contexts = {pass.context, pass.softmax, pass.plan.splits, nullptr};
  value.batch = batch;
  value.width = static_cast<int>(width);
  value.heads = static_cast<int>(num_heads);
  value.norm_weight = query.query.norm_weight;
  value.norm_bias = query.query.norm_bias;
  value.v_bias = vector_of(v_bias);
  value.v_weight = projections.v.const_data_ptr();
  value.out_weight = output.const_data_ptr();
  value.dtype = dtype;
  value.tf32 = query.query.tf32;
  value.aligned = aligned;
  value.heads_aligned = aligned && head * q_weight.itemsize() % 16 == 0;
  value.out = of_heads.mutable_data_ptr<float>();
  check(fusion_value(value, call.stream), "fusion_value");

  const Tensor out = empty({batch, own_width}, revert_weight.scalar_type(), patches);
  FusionRevert revert{};
  revert.heads_out = value.out;
  revert.projected = query.projected;
  revert.batch = batch;
  revert.width = value.width;
  revert.heads = value.heads;
  revert.own_width = query.own_width;
  revert.out_bias = vector_of(out_bias);
  revert.norm_weight = vector_of(revert_norm_weight);
  revert.norm_bias = vector_of(revert_norm_bias);
  revert.bias = vector_of(revert_bias);
  revert.weight = back.const_data_ptr();
  revert.dtype = dtype;
  revert.tf32 = value.tf32;
  revert.aligned = aligned;
  revert.eps = query.query.eps;
  revert.out = out.mutable_data_ptr();
  check(fusion_revert(revert, call.stream), "fusion_revert");
  return out;
}

const Library of_cls_fusion = ops().define<cls_fusion>(schema::cls_fusion.cuda());

}  // namespace crossvit::cuda
