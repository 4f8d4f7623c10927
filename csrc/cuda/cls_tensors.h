// Arguments of cls_cross_attention and cls_fusion as their kernels take them; each owns the copies that it had to make.
#pragma once

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
    tokens.cls = cls.const_data_ptr();
    tokens.cls_dtype = dtype_of(cls);
    tokens.cls_stride = cls.stride(0);
    tokens.data = patches.const_data_ptr();
    tokens.dtype = dtype_of(patches);
    tokens.batch_stride = patches.stride(0);
    tokens.token_stride = patches.stride(1);
    tokens.aligned = aligned_to_16(patches);
    tokens.batch = patches.size(0);
    tokens.patches = static_cast<int>(patches.size(1));
    tokens.width = static_cast<int>(patches.size(2));
    tokens.heads = static_cast<int>(num_heads);
  }

  // The CLS token's part of a kernel's arguments.
  template <class Args>
  void fill(Args& args) const {
    args.cls = tokens.cls;
    args.cls_dtype = tokens.cls_dtype;
    args.cls_stride = tokens.cls_stride;
    args.batch = tokens.batch;
    args.width = tokens.width;
    args.heads = tokens.heads;
  }
};

// The query's arguments, but for where its results go and, of cls_fusion, the CLS tokens.
inline ClsQuery query_of(const Call& call, const DenseTokens& dense, const Tensor& norm_weight,
                         const OptionalTensor& norm_bias, const OptionalTensor& q_bias,
                         const ProjectionWeights& weights, bool aligned, double eps) {
  ClsQuery query{};
  dense.fill(query);
  query.norm_weight = vector_of(norm_weight);
  query.norm_bias = vector_of(norm_bias);
  query.q_bias = vector_of(q_bias);
  query.q_weight = weights.q.const_data_ptr();
  query.k_weight = weights.k.const_data_ptr();
  query.dtype = dtype_of(weights.q);
  query.tf32 = call.tf32;
  query.aligned = aligned;
  query.eps = static_cast<float>(eps);
  return query;
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
    pass.tokens = tokens;
    pass.plan = plan_token_pass(tokens, query.dtype);
    check_width(pass.plan.shared, tokens.width);
    pass.dtype = query.dtype;
    pass.tf32 = query.tf32;
    pass.key_query = query.key_query;
    pass.norm_weight = query.norm_weight;
    pass.eps = query.eps;
    context = empty_f32({tokens.batch, pass.plan.splits, tokens.heads, tokens.width}, dense.patches);
    softmax = empty_f32({tokens.batch, pass.plan.splits, 2, tokens.heads}, dense.patches);
    pass.context = context.mutable_data_ptr<float>();
    pass.softmax = softmax.mutable_data_ptr<float>();
  }
};

}  // namespace crossvit::cuda
