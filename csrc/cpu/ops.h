// The CPU implementations that register.cpp hands to the dispatcher; contracts and saved tensors are those of
// crossvit_kernels/ops/<op>.py. Anyone can call them, through torch.ops: each looks at its arguments first (arguments.h).
#pragma once

#include <tuple>
#include <vector>

#include "launch.h"

namespace crossvit {

// wide: whether a backward gives the gradients of weights and biases in float32, in which they are summed, instead of in the
// dtype that these came in (under autocast a rounding of the parameters, which are float32).

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_linear(const Tensor& x, const Tensor& norm_weight,
                                                             const OptionalTensor& norm_bias, const Tensor& weight,
                                                             const OptionalTensor& bias, double eps, bool gelu_in,
                                                             bool gelu_out, bool save);
std::vector<Tensor> layer_norm_linear_backward(const Tensor& grad_out, const Tensor& x, const Tensor& norm_weight,
                                               const OptionalTensor& norm_bias, const Tensor& weight,
                                               const Tensor& mean, const Tensor& rstd, const Tensor& pre, bool gelu_in,
                                               bool gelu_out, NeedsList list, bool wide);

Tensor linear_residual(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& residual,
                       const OptionalTensor& scale, bool per_sample);
std::vector<Tensor> linear_residual_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                             const OptionalTensor& bias, const OptionalTensor& scale, bool per_sample,
                                             NeedsList list, bool wide);

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_mlp(const Tensor& x, const Tensor& norm_weight,
                                                          const OptionalTensor& norm_bias, const Tensor& w1,
                                                          const OptionalTensor& b1, const Tensor& w2,
                                                          const OptionalTensor& b2, double eps,
                                                          const OptionalTensor& scale, bool per_sample, bool save);
std::vector<Tensor> layer_norm_mlp_backward(const Tensor& grad_out, const Tensor& x, const Tensor& norm_weight,
                                            const OptionalTensor& norm_bias, const Tensor& w1, const Tensor& w2,
                                            const OptionalTensor& b2, const OptionalTensor& scale, bool per_sample,
                                            const Tensor& mean, const Tensor& rstd, const Tensor& pre, NeedsList list,
                                            bool wide);

std::tuple<Tensor, Tensor> self_attention(const Tensor& qkv, int64_t num_heads, bool save);
Tensor self_attention_backward(const Tensor& grad_out, const Tensor& qkv, const Tensor& out, const Tensor& lse,
                               int64_t num_heads);

using CrossAttentionResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
CrossAttentionResult cls_cross_attention(const Tensor& cls, const Tensor& patches, const Tensor& norm_weight,
                                         const OptionalTensor& norm_bias, const Tensor& q_weight,
                                         const OptionalTensor& q_bias, const Tensor& k_weight, const Tensor& v_weight,
                                         const OptionalTensor& v_bias, int64_t num_heads, double eps, bool save);
std::vector<Tensor> cls_cross_attention_backward(const Tensor& grad_out, const Tensor& cls, const Tensor& patches,
                                                 const Tensor& norm_weight, const OptionalTensor& norm_bias,
                                                 const Tensor& q_weight, const Tensor& k_weight, const Tensor& v_weight,
                                                 const Tensor& mean, const Tensor& rstd, const Tensor& probs,
                                                 const Tensor& context, const Tensor& query, const Tensor& key_query,
                                                 int64_t num_heads, NeedsList list, bool wide);
Tensor cls_fusion(const Tensor& cls, const Tensor& patches, const Tensor& proj_norm_weight,
                  const OptionalTensor& proj_norm_bias, const Tensor& proj_weight, const OptionalTensor& proj_bias,
                  const Tensor& norm_weight, const OptionalTensor& norm_bias, const Tensor& q_weight,
                  const OptionalTensor& q_bias, const Tensor& k_weight, const Tensor& v_weight,
                  const OptionalTensor& v_bias, const Tensor& out_weight, const OptionalTensor& out_bias,
                  const Tensor& revert_norm_weight, const OptionalTensor& revert_norm_bias, const Tensor& revert_weight,
                  const OptionalTensor& revert_bias, int64_t num_heads, double eps);

// The same without that look, for transformer_block and cls_fusion, which have had their own.
namespace unchecked {
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_linear(const Tensor& x, const Tensor& norm_weight,
                                                             const OptionalTensor& norm_bias, const Tensor& weight,
                                                             const OptionalTensor& bias, double eps, bool gelu_in,
                                                             bool gelu_out, bool save);
std::tuple<Tensor, Tensor> self_attention(const Tensor& qkv, int64_t num_heads, bool save);
Tensor linear_residual(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& residual,
                       const OptionalTensor& scale, bool per_sample);
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_mlp(const Tensor& x, const Tensor& norm_weight,
                                                          const OptionalTensor& norm_bias, const Tensor& w1,
                                                          const OptionalTensor& b1, const Tensor& w2,
                                                          const OptionalTensor& b2, double eps,
                                                          const OptionalTensor& scale, bool per_sample, bool save);
CrossAttentionResult cls_cross_attention(const Tensor& cls, const Tensor& patches, const Tensor& norm_weight,
                                         const OptionalTensor& norm_bias, const Tensor& q_weight,
                                         const OptionalTensor& q_bias, const Tensor& k_weight, const Tensor& v_weight,
                                         const OptionalTensor& v_bias, int64_t num_heads, double eps, bool save);
}  // namespace unchecked

// Without a value where an argument is not what it should be: then the four ops, called in turn, say so or do without.
OptionalTensor transformer_block(const Tensor& x, const Tensor& norm1_weight, const OptionalTensor& norm1_bias,
                                 double eps1, const Tensor& qkv_weight, const OptionalTensor& qkv_bias,
                                 int64_t num_heads, const Tensor& proj_weight, const OptionalTensor& proj_bias,
                                 const OptionalTensor& scale1, const Tensor& norm2_weight,
                                 const OptionalTensor& norm2_bias, double eps2, const Tensor& w1,
                                 const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2,
                                 const OptionalTensor& scale2);

Tensor bicubic_resize(const Tensor& images, int64_t height, int64_t width);
Tensor bicubic_resize_backward(const Tensor& grad_out, const Tensor& images, int64_t height, int64_t width);

Tensor patch_embed(const Tensor& images, const Tensor& weight, const OptionalTensor& bias, const Tensor& cls_token,
                   const Tensor& pos_embed, int64_t height, int64_t width);
std::vector<Tensor> patch_embed_backward(const Tensor& grad_out, const Tensor& images, const Tensor& weight,
                                         const OptionalTensor& bias, const Tensor& cls_token, const Tensor& pos_embed,
                                         int64_t height, int64_t width, NeedsList list, bool wide);

// Shared by the backward passes (linear_gradients.cpp). The operands of one weight's gradient, for the kernels to fill.
struct WeightOperands {
  Tensor left, right;
  WeightOperands(const Tensor& weight, int64_t rows, int64_t out, int64_t in, bool left_wanted, bool right_wanted);
  void* left_data() const { return left.defined() ? left.data_ptr() : nullptr; }
  void* right_data() const { return right.defined() ? right.data_ptr() : nullptr; }
};

// The call that makes the gradients of a Linear's weight and bias, appended to result, from their operands; transposed: the
// operands are those of the weight's transpose.
WeightGradArgs weight_gradient_call(const WeightOperands& operands, int64_t rows, const Tensor& weight,
                                    ScalarType bias_dtype, bool wide, bool transposed, bool weight_wanted,
                                    bool bias_wanted, std::vector<Tensor>& result);

// All of a Linear's backward, what args say of the gradient's way to it included.
std::vector<Tensor> linear_gradients(LinearGradArgs& args, const Tensor& x, const Tensor& weight,
                                     const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                     ScalarType bias_dtype, bool wide, const LayerNormLinearNeeds& needs);

// The gradient of the factor on a Linear's result.
Tensor scale_gradient(const Tensor& grad_out, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      const Tensor& scale, const Tensor& unscaled, Scale::Kind kind);

// grad W, in float32, of the shape that the Linear's input has.
Tensor input_gradient(const RowTensor& grad, Sizes shape, const Tensor& weight);

}  // namespace crossvit
