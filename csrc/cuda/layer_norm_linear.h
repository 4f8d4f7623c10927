// act(Linear(pre_act(LayerNorm(x)))), and the gradient through the LayerNorm; no torch and no CUDA header.
#pragma once

#include <cstdint>

#include "rows.h"
#include "types.h"

namespace crossvit::cuda {

// LayerNorm's parameters.
struct Norm {
  Vector weight, bias;  // (width,); the bias may be null
  float eps;
};

// out (rows, features) = act(Linear(pre_act(LayerNorm(x)))), x (rows, width) of `dtype` or float32, weight
// (features, width), out and pre of `dtype`.
struct LayerNormLinearArgs {
  DType dtype;
  bool tf32;  // float32 products by TF32 matrix instructions
  Rows x, weight;
  std::int64_t rows;
  int width, features;
  Norm norm;
  Vector bias;
  bool gelu_in, gelu_out;
  Rows out;
  Rows pre;            // what goes into gelu_out; null unless it is to be saved
  float *mean, *rstd;  // (rows,); null unless they are to be saved
  Rows normalized;     // (rows, width) of `dtype`, if layer_norm_linear_in_two(); else null
};
// Whether the normalised rows go through memory, which needs args.normalized.
bool layer_norm_linear_in_two(const LayerNormLinearArgs& args);
Error launch_layer_norm_linear(const LayerNormLinearArgs& args, Stream stream);

// args.normalized = pre_act(LayerNorm(x)) alone; with statistics that are `given` in mean and rstd, or that are made and
// stored there if wanted.
Error layer_norm_rows(const LayerNormLinearArgs& args, bool given, Stream stream);

// From grad (rows, width) of `dtype`, the gradient of act(LayerNorm(x)): that of x, plus `add`, both of x's type, and the
// sums for LayerNorm's weight and bias. What is not wanted is null.
struct LayerNormBackwardArgs {
  DType dtype;
  Rows grad, x, add;
  std::int64_t rows;
  int width;
  const float *mean, *rstd;
  Norm norm;
  bool gelu;
  Rows grad_x;
  Rows y;  // becomes act(LayerNorm(x)), of `dtype`
  Target grad_weight, grad_bias;
  float* partial = nullptr;  // of layer_norm_backward_partial() floats, where a sum is wanted
};
std::int64_t layer_norm_backward_partial(std::int64_t rows, int width);
Error layer_norm_backward(const LayerNormBackwardArgs& args, Stream stream);

}  // namespace crossvit::cuda
