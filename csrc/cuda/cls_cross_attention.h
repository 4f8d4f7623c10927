// What cls_cross_attention's kernels take: pointers and sizes, in the names of crossvit_kernels/ops/cls_cross_attention.py.
// Contiguous float32 where nothing else is said. Weights are contiguous matrices of `dtype`.
#pragma once

#include <cstdint>

#include "cuda/types.h"

namespace crossvit::cuda {

// [cls || patches] of every image.
struct Tokens {
  const void* cls = nullptr;  // (batch, width)
  DType cls_dtype = DType::float32;
  std::int64_t cls_stride = 0;
  const void* data = nullptr;  // (batch, patches, width)
  DType dtype = DType::float32;
  std::int64_t batch_stride = 0, token_stride = 0;
  bool aligned = false;  // every patch begins at a multiple of 16 bytes, and its width is one
  std::int64_t batch = 0;
  int patches = 0, width = 0, heads = 0;
};

// How a pass over the tokens is cut up.
struct TokenPlan {
  int columns;      // the width, rounded up to 16
  int row_bytes;    // from one token in shared memory to the next
  int lanes;        // of a warp, to normalise a token
  int head_groups;  // of 8 heads, at once: 1 or 2
  int sets;         // blocks that share an image's heads
  int parts;        // warps of a warp group, which share a step's columns
  int stages;       // buffers of a warp group's ring
  int splits;       // blocks that share an image's tokens
  int steps;        // of 16 tokens in each
  std::int64_t shared;
};

// plan.shared is more than a block can have where a token is too wide.
TokenPlan plan_token_pass(const Tokens& tokens, DType dtype);
constexpr std::int64_t kSharedMemory = 163 * 1024;

// Statistics, scores, running softmax and contexts.
struct TokenPass {
  Tokens tokens;
  TokenPlan plan;
  DType dtype;  // of the matrix operands
  bool tf32;
  const float* key_query;  // (batch, heads, width)
  Vector norm_weight;
  float eps;
  float *mean, *rstd;  // (batch, 1 + patches), or null
  float* scores;       // (batch, heads, 1 + patches), or null
  float* context;      // (batch, splits, heads, width): weighted means, or sums where splits > 1
  float* softmax;      // (batch, splits, 2, heads): the split's highest score, and the sum of its weights
};
Error token_pass(const TokenPass& args, Stream stream);

// The query, and key_query = W_k,h^T q_h / sqrt(d) of every head.
struct ClsQuery {
  const void* cls;  // (batch, width), rows cls_stride apart
  DType cls_dtype;
  std::int64_t cls_stride, batch;
  int width, heads;
  Vector norm_weight, norm_bias, q_bias;
  const void *q_weight, *k_weight;
  DType dtype;
  bool tf32, aligned;  // aligned: the rows of all weights, and every head's columns, begin at multiples of 16 bytes
  float eps;
  float* query;      // (batch, width), or null
  float* key_query;  // (batch, heads, width)
};
Error cls_query(const ClsQuery& args, Stream stream);

// What the splits of an image's tokens left, to be joined in their order; context and softmax as in TokenPass.
struct SplitContexts {
  const float* context;
  const float* softmax;
  int splits;
  float* joined;  // (batch, heads, width), or null
};

// W_v,h (gamma z_h + beta) + b_v,h of every head; the scores become probabilities.
struct ClsValue {
  SplitContexts contexts;
  float* probs;  // (batch, heads, tokens), scores until then, or null
  int tokens;
  std::int64_t batch;
  int width, heads;
  Vector norm_weight, norm_bias, v_bias;
  const void* v_weight;
  DType dtype;
  bool tf32, aligned;
  void* out;  // (batch, width), of `dtype`
};
Error cls_value(const ClsValue& args, Stream stream);

}  // namespace crossvit::cuda
