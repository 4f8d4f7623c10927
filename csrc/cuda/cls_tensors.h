// Arguments of cls_cross_attention and cls_fusion as their kernels take them; each owns the copies that it had to make.
#pragma once

#include "attention_arguments.h"
#include "cuda/check.h"
#include "cuda/cls_cross_attention.h"

namespace crossvit::cuda {

// The weights of the query, the key and the value, contiguous.
struct ProjectionWeights {
  Tensor q, k, v;
  ProjectionWeights(const Tensor& q_weight, const Tensor& k_weight, const Tensor& v_weight)
      : q(q_weight.contiguous()), k(k_weight.contiguous()), v(v_weight.contiguous()) {}
  bool aligned() const { return aligned_to_16(q) && aligned_to_16(k) && aligned_to_16(v); }
};

// [cls || patches] with dense rows.
struct DenseTokens {
  Tensor cls, patches;
  Tokens tokens;

  DenseTokens(const Tensor& cls_, const Tensor& patches_, std::int64_t num_heads)
      : cls(dense_rows(cls_)), patches(dense_rows(patches_)) {
    require(patches.size(1) < (std::int64_t{1} << 31) - 32, "too many patches");
    tokens = {.cls = cls.const_data_ptr(),
              .cls_dtype = dtype_of(cls),
              .cls_stride = cls.stride(0),
              .data = patches.const_data_ptr(),
              .dtype = dtype_of(patches),
              .batch_stride = patches.stride(0),
              .token_stride = patches.stride(1),
              .aligned = aligned_to_16(patches),
              .batch = patches.size(0),
              .patches = static_cast<int>(patches.size(1)),
              .width = static_cast<int>(patches.size(2)),
              .heads = static_cast<int>(num_heads)};
  }
};

// The query's arguments, but for where its results go.
inline ClsQuery query_of(const Call& call, const DenseTokens& dense, const NormParams& norm,
                         const OptionalTensor& q_bias, const ProjectionWeights& weights, bool aligned, double eps) {
  const Tokens& tokens = dense.tokens;
  return {.cls = tokens.cls,
          .cls_dtype = tokens.cls_dtype,
          .cls_stride = tokens.cls_stride,
          .batch = tokens.batch,
          .width = tokens.width,
          .heads = tokens.heads,
          .norm_weight = vector_of(norm.weight),
          .norm_bias = vector_of(norm.bias),
          .q_bias = vector_of(q_bias),
          .q_weight = weights.q.const_data_ptr(),
          .k_weight = weights.k.const_data_ptr(),
          .dtype = dtype_of(weights.q),
          .tf32 = call.tf32,
          .aligned = aligned,
          .eps = static_cast<float>(eps)};
}

inline void check_width(std::int64_t shared, std::int64_t width) {
  require(shared <= kSharedMemory, "cls_cross_attention's CUDA kernels hold tokens in shared memory; ", width,
          " elements are too wide for it");
}

// What the pass over the tokens leaves for every split of an image's tokens; owns it.
struct SplitResults {
  Tensor context, softmax;
  TokenPass pass{};

  // The pass behind `query`, but for the statistics and scores that a backward needs.
  SplitResults(const DenseTokens& dense, const ClsQuery& query) {
    const Tokens& tokens = dense.tokens;
    const TokenPlan plan = plan_token_pass(tokens, query.dtype);
    check_width(plan.shared, tokens.width);
    context = empty_f32({tokens.batch, plan.splits, tokens.heads, tokens.width}, dense.patches);
    softmax = empty_f32({tokens.batch, plan.splits, 2, tokens.heads}, dense.patches);
    pass = {.tokens = tokens,
            .plan = plan,
            .dtype = query.dtype,
            .tf32 = query.tf32,
            .key_query = query.key_query,
            .norm_weight = query.norm_weight,
            .eps = query.eps,
            .context = float_data(context),
            .softmax = float_data(softmax)};
  }
};

}  // namespace crossvit::cuda
