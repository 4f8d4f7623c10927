// Products of a Linear, forward and backward, with what other ops do to their results; no torch and no CUDA header.
#pragma once

#include <cstdint>

#include "rows.h"
#include "types.h"

namespace crossvit::cuda {

// The factor of a residual branch: per sample, whose rows follow each other, or per channel.
struct Scale {
  enum Kind : int { none, sample, channel };
  Kind kind = none;
  const float* values = nullptr;
  bool aligned = false;  // values begin at a multiple of 16 bytes
  std::uint32_t rows_per_sample = 1;
};

// What happens to the sums v of a product before they are stored, in this order; what has no data is left out.
struct Epilogue {
  // These go with x weight^T; out is of the operands' type or, without pre and gelu, float32.
  Vector bias;        // v += bias[column]
  Rows pre;           // pre = v, of the operands' type
  bool gelu = false;  // v = gelu(v)
  Scale scale;        // v *= scale
  Rows residual;      // v += residual, of out's type
  // These go with x weight; all are of the operands' type.
  Rows gelu_of;    // v *= gelu'(gelu_of)
  Rows activated;  // activated = gelu(gelu_of)
  // This one goes with both.
  Rows out;  // out = v
};

// out (rows, columns) = epilogue(x weight^T), x (rows, depth), weight (columns, depth); or, if `transposed`,
// epilogue(x weight), weight (depth, columns). x and weight are of `dtype`.
struct LinearArgs {
  DType dtype;
  bool tf32;  // float32 products by TF32 matrix instructions
  bool transposed;
  Rows x, weight;
  std::int64_t rows;
  int depth, columns;
  Epilogue epilogue;
};
Error linear(const LinearArgs& args, Stream stream);

// grad_weight (features, width) = grad^T x and grad_bias (features) = column sums of grad, over grad (rows, features) and
// x (rows, width) of `dtype`, as is grad_weight, which is contiguous. Either may have no data.
struct WeightGradientArgs {
  DType dtype;
  bool tf32;
  Rows grad, x;
  std::int64_t rows;
  int features, width;
  Rows grad_weight;
  Target grad_bias;
  float* partial = nullptr;  // of weight_gradient_partial() floats
};
// How many floats args.partial has to have, looking at sizes and at what is wanted; 0 where one block sums all rows.
std::int64_t weight_gradient_partial(const WeightGradientArgs& args);
Error weight_gradient(const WeightGradientArgs& args, Stream stream);

// out (rows, columns) = scale * grad * gelu'(pre), the last factor where pre has data. grad is of the type of pre and out
// or float32.
struct ScaledGradientArgs {
  Rows grad, pre, out;
  Scale scale;
  std::int64_t rows;
  int columns;
};
Error scaled_gradient(const ScaledGradientArgs& args, Stream stream);

}  // namespace crossvit::cuda
