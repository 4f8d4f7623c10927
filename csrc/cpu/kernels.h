// What the torch side (<op>.cpp) and the kernels (isa.cpp, compiled once per instruction set) agree on: plain structs of
// pointers and sizes, and one table of functions per instruction set.
#pragma once

#include <cstdint>

#include "plain.h"

namespace crossvit {

// Rows of a matrix whose leading dimensions may be strided: row m lies at
// data + (m / per_batch) * batch_stride + (m % per_batch) * row_stride, in elements; its elements are contiguous.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t per_batch = 1, batch_stride = 0, row_stride = 0;
};

// A matrix (out, in) as nn.Linear holds it: rows contiguous, row_stride elements apart.
struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t row_stride = 0;
};

// LayerNorm over a row. Forward writes mean and rstd (where not null), backward reads them.
struct Norm {
  bool present = false;
  Vector weight, bias;
  float eps = 0;
  float *mean = nullptr, *rstd = nullptr;
};

// A factor on a Linear's result: none, one per sample of rows_per_sample rows, or one per channel.
struct Scale {
  enum Kind : int32_t { none, sample, channel } kind = none;
  Vector values;
  int64_t rows_per_sample = 1;
};

// How a call of a kernel is cut into tasks, as the kernel's plan() says: into how many and, of some kernels, what they are.
struct Plan {
  int64_t tasks = 0;
};
// A product's result in pieces (tasks.h).
struct ProductPlan : Plan {
  int64_t of_columns = 1, threads = 1;  // pieces of the columns; threads that panels of the rows are divided over
};
struct PanelPlan : Plan {
  int64_t threads = 1;  // that panels of the rows are divided over
};
struct SplitPlan : Plan {
  int64_t splits = 1;  // of an image's tokens or of a head's queries
};
struct WeightGradPlan : Plan {
  int64_t out_chunk = 0, in_chunk = 0;  // rows and columns of the product in a task
};

// out = residual + scale * act(Linear(pre_act(norm(x)))), every part but Linear optional.
struct LinearArgs {
  Rows x, out, residual, pre;  // pre: Linear's result before the activation, wanted where data is not null
  int64_t rows, in, out_features;
  Norm norm;
  bool gelu_in = false, gelu_out = false;
  Matrix weight;
  Vector bias;
  Scale scale;
};

// out = x + scale * (W2 gelu(W1 norm(x) + b1) + b2), a row panel at a time, the hidden activations in cache.
struct MlpArgs {
  Rows x, out, pre;
  int64_t rows, width, hidden;
  Norm norm;
  Matrix w1, w2;
  Vector b1, b2;
  Scale scale;
};

// The gradient of a weight (out, in) is left (out, rows) times right (rows, in): the gradient of what the weight made, and
// what it took. The kernels below leave both as operands.h lays them out, in the dtype of the products.

// The gradient of LinearArgs' x, through the activation, the product with the weight (transposed: (in, out)) and LayerNorm,
// and the operands of the weight's gradient; each where its pointers are not null.
struct LinearGradArgs {
  Rows grad, pre, x, grad_x;
  int64_t rows, in, out_features;
  DType products = DType::float32;
  Norm norm;
  bool gelu_in = false, gelu_out = false;
  Matrix weight_t;
  Scale scale;
  float *grad_norm_weight = nullptr, *grad_norm_bias = nullptr;  // (tasks, in) partial sums, one row per task
  void *left = nullptr, *right = nullptr;
};

// The same of MlpArgs, whose weights' gradients are left1 right1 and (left2 right2)^T: left2 is the hidden activations.
struct MlpGradArgs {
  Rows grad, pre, x, grad_x;
  int64_t rows, width, hidden;
  DType products = DType::float32;
  Norm norm;
  Matrix w1_t, w2_t;  // (width, hidden), (hidden, width)
  Scale scale;
  float *grad_norm_weight = nullptr, *grad_norm_bias = nullptr;
  void *left1 = nullptr, *right1 = nullptr, *left2 = nullptr, *right2 = nullptr;
};

// grad_weight = left right, or its transpose; the bias's gradient is the sum over rows of the side that is the gradient,
// the left one or, where the product is transposed, the right one.
struct WeightGradArgs {
  const void *left, *right;
  int64_t rows, out, in;  // out: of the left side, in: of the right one
  DType products;
  bool transposed = false;
  Rows grad_weight;           // null: only the bias is wanted
  void* grad_bias = nullptr;  // null: not wanted
  DType grad_bias_dtype = DType::float32;
};

// to (columns, rows) = transpose of from (rows, columns), in the dtype asked for.
struct TransposeArgs {
  Rows from;
  int64_t rows, columns;
  void* to;
  DType to_dtype;
};

// Multi-head self-attention over packed qkv (batch, tokens, 3 * heads * width), and its gradient.
struct AttentionArgs {
  const void* qkv;
  void* out;
  DType dtype;
  int64_t batch, tokens, heads, width;  // width of one head
  int64_t batch_stride, token_stride;   // of qkv, in elements
  float* lse;                           // (batch, heads, tokens), or null
};
struct AttentionGradArgs {
  const void *qkv, *out, *grad_out;  // out and grad_out contiguous (batch, tokens, heads * width)
  void* grad_qkv;                    // contiguous
  DType dtype;
  int64_t batch, tokens, heads, width;
  int64_t batch_stride, token_stride;
  const float* lse;
};

// Single-query cross-attention in the absorbed form; token_pass.h has the formula that the names come from.
// result (batch, heads, width) = scale * W_h^T rows[b][h], rows (batch, heads * head_width).
struct AbsorbArgs {
  const float* rows;
  Matrix weight;  // (heads * head_width, width)
  float* result;
  int64_t batch, heads, head_width, width;
  float scale;
};
// out (batch, heads * head_width) = scale * (W_h (gamma . rows[b][h] + beta) + bias), rows (batch, heads, width).
struct ProjectHeadsArgs {
  const float* rows;
  Matrix weight;
  Vector gamma, beta, bias;
  Rows out;
  int64_t batch, heads, head_width, width;
  float scale;
};
struct TokenPassArgs {
  Rows cls, patches;  // patches: batch_stride and row_stride; one image is `tokens` rows
  int64_t batch, tokens, width, heads;
  Norm norm;                 // gamma alone enters; mean and rstd (batch, 1 + tokens), or null
  const float* key_query;    // (batch, heads, width)
  float* probs;              // (batch, heads, 1 + tokens), or null
  float* context;            // (batch, heads, width)
  float* partial = nullptr;  // (batch, splits, heads, width + 2) where splits > 1: context, maximum and sum of a split
};
// The same context and probs from what the splits left, joined in the order of the tokens.
struct JoinSplitsArgs {
  int64_t batch, splits, tokens, width, heads;
  const float* partial;
  float *probs, *context;
};
struct TokenGradientArgs {
  Rows cls, patches, grad_patches;
  int64_t batch, tokens, width, heads;
  Norm norm;
  const float *key_query, *probs, *context, *grad_context;
  float* grad_normalized;  // (batch, width): of the CLS token, by way of keys and values
  float* grad_u;           // (batch, heads, width)
};

// Bicubic interpolation along one axis: result i is the sum over t < 4 of weight[t][i] * pixel(first[i] + t - kBorder),
// pixels outside the image being the nearest inside. kTapPadding more entries follow the last result's.
constexpr int64_t kBorder = 2;
constexpr int64_t kTapPadding = 16;
struct Taps {
  const int32_t* first;
  const float* weight[4];
  int64_t in, out;
};

// Images (batch, channels, rows.in, columns.in), rows contiguous, how each axis is resized, and the patches that they are cut into.
struct Images {
  void* data;
  DType dtype;
  int64_t batch_stride, channel_stride, row_stride, channels;  // strides in elements
  Taps rows, columns;
  bool resize;                        // if not, the taps' pointers are null
  int64_t extent;                     // elements from data to the end of the images
  int64_t patch, per_row, per_image;  // patch: its side; patches per row and image
};

// out, contiguous and of the images' dtype, (batch, channels, rows.out, columns.out) = the images resized.
struct ResizeArgs {
  Images images;
  int64_t batch;
  void* out;
};

// The gradient of the images (images.data, written) from that of the resized images, contiguous and of their dtype, or from that
// of the patches as rows of floats.
struct ImagesGradArgs {
  Images images;
  int64_t batch;
  const void* grad;
};

// out[m] = W patch_m + bias + positions[m] for all patches of all images; cls_out[b] = cls_token + cls_position.
struct PatchEmbedArgs {
  Images images;
  int64_t patches, out_features;
  Matrix weight;  // (out, channels * patch * patch)
  Vector bias;
  Rows positions, out, cls_token, cls_position, cls_out;
};

// The patches as rows (patches, channels * patch * patch), for the weight's gradient.
struct PatchRowsArgs {
  Images images;
  int64_t patches;
  float* rows;
};

// A kernel: how a call is cut into independent tasks, the scratch bytes that one needs, and one task. Tasks write disjoint memory
// and their arithmetic does not depend on how many there are, so results do not depend on threads.
template <class Args, class P = Plan>
struct Kernel {
  P (*plan)(const Args&, int64_t threads);
  int64_t (*scratch)(const Args&, const P&);
  void (*run)(const Args&, const P&, int64_t task, char* scratch);
};

struct Kernels {
  const char* name;
  bool dot_bf16;                                                             // products of bfloat16 pairs
  int64_t (*operand_bytes)(int64_t rows, int64_t features, DType products);  // of a left or right operand
  Kernel<LinearArgs, ProductPlan> linear;
  Kernel<MlpArgs, PanelPlan> mlp;
  Kernel<LinearGradArgs> linear_grad;
  Kernel<MlpGradArgs> mlp_grad;
  Kernel<WeightGradArgs, WeightGradPlan> weight_grad;
  Kernel<TransposeArgs> transpose;
  Kernel<AttentionArgs, SplitPlan> attention;
  Kernel<AttentionGradArgs> attention_grad;
  Kernel<ResizeArgs> resize;
  Kernel<ImagesGradArgs> resize_grad;
  Kernel<PatchEmbedArgs, ProductPlan> patch_embed;
  Kernel<PatchRowsArgs> patch_rows;
  Kernel<ImagesGradArgs> patch_grad_images;
  Kernel<AbsorbArgs> absorb;
  Kernel<ProjectHeadsArgs> project_heads;
  Kernel<TokenPassArgs, SplitPlan> token_pass;
  Kernel<JoinSplitsArgs> join_splits;
  Kernel<TokenGradientArgs> token_gradient;
};

}  // namespace crossvit
