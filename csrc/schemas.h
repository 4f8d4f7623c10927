// The schemas of the native ops, the same in every namespace that has them: crossvit_kernels_cpu, crossvit_kernels_cuda.
#pragma once

#include <string>

namespace crossvit::schema {

// An op that the CPU and CUDA have. On CUDA a caller says also whether products of float32 may be computed in TF32, which is a
// setting of PyTorch's that its C interface does not tell.
struct Forward {
  const char *arguments, *results;
  std::string cpu() const { return std::string(arguments) + ") -> " + results; }
  std::string cuda() const { return std::string(arguments) + ", bool tf32=False) -> " + results; }
};

// The backward of an op with parameters, whose results are the gradients that `needs` asks for. On the CPU a caller says beside
// them whether those of weights and biases shall be in float32 (`wide`, see cpu/ops.h).
struct Backward {
  const char* arguments;
  std::string cpu() const { return std::string(arguments) + ", bool wide) -> Tensor[]"; }
  std::string cuda() const { return std::string(arguments) + ", bool tf32=False) -> Tensor[]"; }
};

inline constexpr Forward layer_norm_linear{
    "layer_norm_linear(Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor weight, Tensor? bias, float eps, bool "
    "gelu_in, bool gelu_out, bool save",
    "(Tensor out, Tensor mean, Tensor rstd, Tensor pre)"};

inline constexpr Backward layer_norm_linear_backward{
    "layer_norm_linear_backward(Tensor grad_out, Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor weight, "
    "Tensor mean, Tensor rstd, Tensor pre, bool gelu_in, bool gelu_out, bool[] needs"};

inline constexpr Forward linear_residual{
    "linear_residual(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? scale, bool per_sample", "Tensor"};

inline constexpr Backward linear_residual_backward{
    "linear_residual_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, Tensor? scale, bool "
    "per_sample, bool[] needs"};

inline constexpr Forward layer_norm_mlp{
    "layer_norm_mlp(Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, "
    "float eps, Tensor? scale, bool per_sample, bool save",
    "(Tensor out, Tensor mean, Tensor rstd, Tensor pre)"};

inline constexpr Backward layer_norm_mlp_backward{
    "layer_norm_mlp_backward(Tensor grad_out, Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor w1, Tensor "
    "w2, Tensor? b2, Tensor? scale, bool per_sample, Tensor mean, Tensor rstd, Tensor pre, bool[] needs"};

inline constexpr Forward cls_cross_attention{
    "cls_cross_attention(Tensor cls, Tensor patches, Tensor norm_weight, Tensor? norm_bias, Tensor q_weight, Tensor? "
    "q_bias, Tensor k_weight, Tensor v_weight, Tensor? v_bias, int num_heads, float eps, bool save",
    "(Tensor out, Tensor mean, Tensor rstd, Tensor probs, Tensor context, Tensor query, Tensor key_query)"};

inline constexpr Backward cls_cross_attention_backward{
    "cls_cross_attention_backward(Tensor grad_out, Tensor cls, Tensor patches, Tensor norm_weight, Tensor? "
    "norm_bias, Tensor q_weight, Tensor k_weight, Tensor v_weight, Tensor mean, Tensor rstd, Tensor probs, "
    "Tensor context, Tensor query, Tensor key_query, int num_heads, bool[] needs"};

inline constexpr Forward cls_fusion{
    "cls_fusion(Tensor cls, Tensor patches, Tensor proj_norm_weight, Tensor? proj_norm_bias, Tensor proj_weight, "
    "Tensor? proj_bias, Tensor norm_weight, Tensor? norm_bias, Tensor q_weight, Tensor? q_bias, Tensor k_weight, "
    "Tensor v_weight, Tensor? v_bias, Tensor out_weight, Tensor? out_bias, Tensor revert_norm_weight, Tensor? "
    "revert_norm_bias, Tensor revert_weight, Tensor? revert_bias, int num_heads, float eps",
    "Tensor"};

// On the CPU alone, and of no public op: see crossvit_kernels/ops/transformer_block.py.
inline constexpr const char* transformer_block =
    "transformer_block(Tensor x, Tensor norm1_weight, Tensor? norm1_bias, float eps1, Tensor qkv_weight, Tensor? "
    "qkv_bias, int num_heads, Tensor proj_weight, Tensor? proj_bias, Tensor? scale1, Tensor norm2_weight, Tensor? "
    "norm2_bias, float eps2, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? scale2) -> Tensor?";

inline constexpr const char* self_attention =
    "self_attention(Tensor qkv, int num_heads, bool save) -> (Tensor out, Tensor lse)";

inline constexpr const char* self_attention_backward =
    "self_attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, int num_heads) -> Tensor";

inline constexpr const char* bicubic_resize = "bicubic_resize(Tensor images, int height, int width) -> Tensor";

inline constexpr const char* bicubic_resize_backward =
    "bicubic_resize_backward(Tensor grad_out, Tensor images, int height, int width) -> Tensor";

inline constexpr Forward patch_embed{
    "patch_embed(Tensor images, Tensor weight, Tensor? bias, Tensor cls_token, Tensor pos_embed, int height, int "
    "width",
    "Tensor"};

inline constexpr Backward patch_embed_backward{
    "patch_embed_backward(Tensor grad_out, Tensor images, Tensor weight, Tensor? bias, Tensor cls_token, Tensor "
    "pos_embed, int height, int width, bool[] needs"};

}  // namespace crossvit::schema
