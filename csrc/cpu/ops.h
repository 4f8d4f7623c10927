// The CPU implementations of the native ops (arguments.h), as far as they call each other, and what they share. Contracts and saved
// tensors are those of crossvit_kernels/ops/<op>.py. `wide` says whether a backward gives the gradients of weights and biases in
// float32, in which they are summed, instead of in the dtype that these came in (under autocast a rounding of the parameters,
// which are float32).
#pragma once

#include <vector>

#include "attention_arguments.h"
#include "launch.h"

namespace crossvit {

LayerNormLinear::Results layer_norm_linear(const LayerNormLinear& a);
Tensor linear_residual(const LinearResidual& a);
LayerNormMlp::Results layer_norm_mlp(const LayerNormMlp& a);
SelfAttention::Results self_attention(const SelfAttention& a);
ClsCrossAttention::Results cls_cross_attention(const ClsCrossAttention& a);

// The ops of crossvit_kernels_cpu, which each <op>.cpp defines for its own functions. Those that users call are registered from
// Python, in crossvit_kernels/ops.
inline Library ops() { return {"crossvit_kernels_cpu", "CPU", ", bool wide"}; }

// Linear(x) over rows, with what `args` says of norm, activations, residual and results (linear.h).
void multiply(LinearArgs args, const RowTensor& x, const LinearParams& linear);

// Shared by the backward passes (linear_gradients.cpp). The operands of one weight's gradient, for the kernels to fill.
struct WeightOperands {
  Tensor left, right;
  WeightOperands(const Tensor& weight, int64_t rows, int64_t out, int64_t in, bool left_wanted, bool right_wanted);
};

// The call that makes the gradients of a Linear's weight and bias, appended to result, from their operands; transposed: the
// operands are those of the weight's transpose.
WeightGradArgs weight_gradient_call(const WeightOperands& operands, int64_t rows, const Tensor& weight,
                                    ScalarType bias_dtype, bool wide, bool transposed, bool weight_wanted,
                                    bool bias_wanted, std::vector<Tensor>& result);

// All of a Linear's backward, what args say of the gradient's way to it included; `norm` is of a LayerNorm before it, if any.
std::vector<Tensor> linear_gradients(LinearGradArgs args, const Tensor& x, const Tensor& weight, const NormParams* norm,
                                     ScalarType bias_dtype, bool wide, const LayerNormLinearNeeds& needs);

// The gradient of the factor on Linear(x), from that of their product.
Tensor scale_gradient(const Tensor& grad_out, const Tensor& x, const LinearParams& linear, const ScaleParams& scale);

// grad W, in float32, of the shape that the Linear's input has.
Tensor input_gradient(const RowTensor& grad, Sizes shape, const Tensor& weight);

}  // namespace crossvit
