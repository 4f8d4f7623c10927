// The CPU implementations that bindings.cpp hands to the dispatcher; contracts and saved tensors are those of
// crossvit_kernels/ops/<op>.py, which has validated the arguments.
#pragma once

#include <tuple>
#include <vector>

#include "launch.h"

namespace crossvit {

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_linear(const Tensor& x, const Tensor& norm_weight,
                                                             const OptionalTensor& norm_bias, const Tensor& weight,
                                                             const OptionalTensor& bias, double eps, bool gelu_in,
                                                             bool gelu_out, bool save);
std::vector<Tensor> layer_norm_linear_backward(const Tensor& grad_out, const Tensor& x, const Tensor& norm_weight,
                                               const OptionalTensor& norm_bias, const Tensor& weight,
                                               const Tensor& mean, const Tensor& rstd, const Tensor& pre, bool gelu_in,
                                               bool gelu_out, Needs needs);

Tensor linear_residual(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& residual,
                       const OptionalTensor& scale);
std::vector<Tensor> linear_residual_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                             const OptionalTensor& bias, const OptionalTensor& scale, Needs needs);

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_mlp(const Tensor& x, const Tensor& norm_weight,
                                                          const OptionalTensor& norm_bias, const Tensor& w1,
                                                          const OptionalTensor& b1, const Tensor& w2,
                                                          const OptionalTensor& b2, double eps,
                                                          const OptionalTensor& scale, bool save);
std::vector<Tensor> layer_norm_mlp_backward(const Tensor& grad_out, const Tensor& x, const Tensor& norm_weight,
                                            const OptionalTensor& norm_bias, const Tensor& w1, const Tensor& w2,
                                            const OptionalTensor& b2, const OptionalTensor& scale, const Tensor& mean,
                                            const Tensor& rstd, const Tensor& pre, Needs needs);

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
                                                 int64_t num_heads, Needs needs);
Tensor cls_fusion(const Tensor& cls, const Tensor& patches, const Tensor& proj_norm_weight,
                  const OptionalTensor& proj_norm_bias, const Tensor& proj_weight, const OptionalTensor& proj_bias,
                  const Tensor& norm_weight, const OptionalTensor& norm_bias, const Tensor& q_weight,
                  const OptionalTensor& q_bias, const Tensor& k_weight, const Tensor& v_weight,
                  const OptionalTensor& v_bias, const Tensor& out_weight, const OptionalTensor& out_bias,
                  const Tensor& revert_norm_weight, const OptionalTensor& revert_norm_bias, const Tensor& revert_weight,
                  const OptionalTensor& revert_bias, int64_t num_heads, double eps);

Tensor patch_embed(const Tensor& images, const Tensor& weight, const OptionalTensor& bias, const Tensor& cls_token,
                   const Tensor& pos_embed, int64_t height, int64_t width);
std::vector<Tensor> patch_embed_backward(const Tensor& grad_out, const Tensor& images, const Tensor& weight,
                                         const OptionalTensor& bias, const Tensor& cls_token, const Tensor& pos_embed,
                                         int64_t height, int64_t width, Needs needs);

// Shared by the backward passes: the gradients of a Linear's weight and bias (appended to result), and of the factor on
// its result.
void weight_gradients(const Rows& grad, const Rows& pre, const Rows& x, int64_t rows, const Norm& norm, bool gelu_in,
                      bool gelu_out, const Scale& scale, const Tensor& weight, at::ScalarType bias_dtype,
                      bool weight_wanted, bool bias_wanted, std::vector<Tensor>& result);
Tensor scale_gradient(const Tensor& grad_out, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      const Tensor& scale, const Tensor& unscaled, Scale::Kind kind);

}  // namespace crossvit
