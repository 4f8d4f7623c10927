// The arguments of every native op: which shapes, dtypes and saved tensors go with each other, in the words of the contracts in
// crossvit_kernels/ops/<op>.py. Each function throws where they do not; that of a backward also reads the list of wanted gradients.
// What is empty does not come here: the reference serves it.
#pragma once

#include "expect.h"

namespace crossvit::arguments {

inline std::int64_t rows_of(const Tensor& x) { return x.numel() / x.sizes().back(); }

// x (..., D) and a LayerNorm over its rows.
inline void normalized(const Expect& expect, const Tensor& x, const Tensor& norm_weight,
                       const OptionalTensor& norm_bias) {
  expect.rows("x", x);
  expect.vector("norm_weight", norm_weight, x.sizes().back());
  expect.vector("norm_bias", norm_bias, x.sizes().back());
}

// The factor of a residual branch onto `residual` (B, ..., E).
inline void scaled(const Expect& expect, const OptionalTensor& scale, bool per_sample, const Tensor& residual) {
  if (!scale) return;
  if (per_sample) return expect.per_sample("scale", *scale, residual);
  expect.tensor("scale", *scale, {residual.sizes().back()});
}

// --- layer_norm_linear: x (..., D), weight (E, D) -----------------------------------------------------------------------

inline void layer_norm_linear(Taken taken, const Tensor& x, const Tensor& norm_weight, const OptionalTensor& norm_bias,
                              const Tensor& weight, const OptionalTensor& bias, double eps) {
  const Expect expect("layer_norm_linear", taken, "x", x);
  normalized(expect, x, norm_weight, norm_bias);
  expect.matrix("weight", weight, x.sizes().back());
  expect.activation("x", x, weight.scalar_type());
  expect.vector("bias", bias, weight.sizes()[0]);
  expect.epsilon(eps);
  expect.countable("x", rows_of(x), weight.sizes()[0]);
}

inline LayerNormLinearNeeds layer_norm_linear_backward(Taken taken, const Tensor& grad_out, const Tensor& x,
                                                       const Tensor& norm_weight, const OptionalTensor& norm_bias,
                                                       const Tensor& weight, const Tensor& mean, const Tensor& rstd,
                                                       const Tensor& pre, bool gelu_out, const NeedsList& list) {
  const Expect expect("layer_norm_linear_backward", taken, "x", x);
  normalized(expect, x, norm_weight, norm_bias);
  expect.matrix("weight", weight, x.sizes().back());
  expect.activation("x", x, weight.scalar_type());
  const std::int64_t rows = rows_of(x), features = weight.sizes()[0];
  expect.countable("x", rows, x.sizes().back());
  expect.countable("grad_out", rows, features);
  expect.beside("grad_out", grad_out, x, features);
  expect.saved("mean", mean, {rows});
  expect.saved("rstd", rstd, {rows});
  expect.saved("pre", pre, {gelu_out ? rows : 0, features}, weight.scalar_type());
  const auto needs = expect.needs<LayerNormLinearNeeds>(list);
  expect.needed("norm_bias", needs.norm_bias, norm_bias);
  return needs;
}

// --- linear_residual: x (..., K), weight (E, K), residual (..., E) ------------------------------------------------------

inline void linear_residual(Taken taken, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                            const Tensor& residual, const OptionalTensor& scale, bool per_sample) {
  const Expect expect("linear_residual", taken, "x", x);
  expect.rows("x", x);
  expect.matrix("weight", weight, x.sizes().back());
  expect.of_dtype("x", x, weight.scalar_type());
  expect.vector("bias", bias, weight.sizes()[0]);
  expect.beside("residual", residual, x, weight.sizes()[0]);
  scaled(expect, scale, per_sample, residual);
  expect.countable("x", rows_of(x), weight.sizes()[0]);
}

inline LinearResidualNeeds linear_residual_backward(Taken taken, const Tensor& grad_out, const Tensor& x,
                                                    const Tensor& weight, const OptionalTensor& bias,
                                                    const OptionalTensor& scale, bool per_sample,
                                                    const NeedsList& list) {
  const Expect expect("linear_residual_backward", taken, "x", x);
  expect.rows("x", x);
  expect.matrix("weight", weight, x.sizes().back());
  expect.of_dtype("x", x, weight.scalar_type());
  expect.vector("bias", bias, weight.sizes()[0]);
  expect.beside("grad_out", grad_out, x, weight.sizes()[0]);
  scaled(expect, scale, per_sample, grad_out);
  expect.countable("x", rows_of(x), x.sizes().back());
  expect.countable("grad_out", rows_of(x), weight.sizes()[0]);
  const auto needs = expect.needs<LinearResidualNeeds>(list);
  expect.needed("bias", needs.bias, bias);
  expect.needed("scale", needs.scale, scale);
  return needs;
}

// --- layer_norm_mlp: x (..., D), w1 (hidden, D), w2 (D, hidden) ---------------------------------------------------------

inline void layer_norm_mlp(Taken taken, const Tensor& x, const Tensor& norm_weight, const OptionalTensor& norm_bias,
                           const Tensor& w1, const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2,
                           double eps, const OptionalTensor& scale, bool per_sample) {
  const Expect expect("layer_norm_mlp", taken, "x", x);
  normalized(expect, x, norm_weight, norm_bias);
  expect.matrix("w1", w1, x.sizes().back());
  expect.activation("x", x, w1.scalar_type());
  const std::int64_t width = x.sizes().back(), hidden = w1.sizes()[0];
  expect.vector("b1", b1, hidden);
  expect.tensor("w2", w2, {width, hidden}, w1.scalar_type());
  expect.vector("b2", b2, width);
  expect.epsilon(eps);
  scaled(expect, scale, per_sample, x);
  expect.countable("x", rows_of(x), hidden);
}

inline LayerNormMlpNeeds layer_norm_mlp_backward(Taken taken, const Tensor& grad_out, const Tensor& x,
                                                 const Tensor& norm_weight, const OptionalTensor& norm_bias,
                                                 const Tensor& w1, const Tensor& w2, const OptionalTensor& b2,
                                                 const OptionalTensor& scale, bool per_sample, const Tensor& mean,
                                                 const Tensor& rstd, const Tensor& pre, const NeedsList& list) {
  const Expect expect("layer_norm_mlp_backward", taken, "x", x);
  normalized(expect, x, norm_weight, norm_bias);
  expect.matrix("w1", w1, x.sizes().back());
  expect.activation("x", x, w1.scalar_type());
  const std::int64_t rows = rows_of(x), width = x.sizes().back(), hidden = w1.sizes()[0];
  expect.countable("x", rows, width);
  expect.countable("w1", rows, hidden);
  expect.tensor("w2", w2, {width, hidden}, w1.scalar_type());
  expect.vector("b2", b2, width);
  scaled(expect, scale, per_sample, x);
  expect.beside("grad_out", grad_out, x, width);
  expect.saved("mean", mean, {rows});
  expect.saved("rstd", rstd, {rows});
  expect.saved("pre", pre, {rows, hidden}, w1.scalar_type());
  const auto needs = expect.needs<LayerNormMlpNeeds>(list);
  expect.needed("norm_bias", needs.norm_bias, norm_bias);
  expect.needed("b2", needs.b2, b2);
  expect.needed("scale", needs.scale, scale);
  return needs;
}

// --- cls_cross_attention: cls (B, D), patches (B, N, D), weights (D, D) -------------------------------------------------

// All but cls.
inline void tokens(const Expect& expect, const Tensor& patches, const Tensor& norm_weight,
                   const OptionalTensor& norm_bias, const Tensor& q_weight, const Tensor& k_weight,
                   const Tensor& v_weight, std::int64_t num_heads) {
  expect.rank("patches", patches, 3);
  const std::int64_t width = patches.sizes()[2];
  expect.vector("norm_weight", norm_weight, width);
  expect.vector("norm_bias", norm_bias, width);
  expect.tensor("q_weight", q_weight, {width, width});
  const ScalarType dtype = q_weight.scalar_type();
  expect.tensor("k_weight", k_weight, {width, width}, dtype);
  expect.tensor("v_weight", v_weight, {width, width}, dtype);
  expect.activation("patches", patches, dtype);
  expect.heads(num_heads, width);
}

inline void cls_cross_attention(Taken taken, const Tensor& cls, const Tensor& patches, const Tensor& norm_weight,
                                const OptionalTensor& norm_bias, const Tensor& q_weight, const OptionalTensor& q_bias,
                                const Tensor& k_weight, const Tensor& v_weight, const OptionalTensor& v_bias,
                                std::int64_t num_heads, double eps) {
  const Expect expect("cls_cross_attention", taken, "patches", patches);
  tokens(expect, patches, norm_weight, norm_bias, q_weight, k_weight, v_weight, num_heads);
  const std::int64_t width = patches.sizes()[2];
  expect.tensor("cls", cls, {patches.sizes()[0], width});
  expect.activation("cls", cls, q_weight.scalar_type());
  expect.vector("q_bias", q_bias, width);
  expect.vector("v_bias", v_bias, width);
  expect.epsilon(eps);
}

inline ClsCrossAttentionNeeds cls_cross_attention_backward(
    Taken taken, const Tensor& grad_out, const Tensor& cls, const Tensor& patches, const Tensor& norm_weight,
    const OptionalTensor& norm_bias, const Tensor& q_weight, const Tensor& k_weight, const Tensor& v_weight,
    const Tensor& mean, const Tensor& rstd, const Tensor& probs, const Tensor& context, const Tensor& query,
    const Tensor& key_query, std::int64_t num_heads, const NeedsList& list) {
  const Expect expect("cls_cross_attention_backward", taken, "patches", patches);
  tokens(expect, patches, norm_weight, norm_bias, q_weight, k_weight, v_weight, num_heads);
  const std::int64_t batch = patches.sizes()[0], all = 1 + patches.sizes()[1], width = patches.sizes()[2];
  expect.tensor("cls", cls, {batch, width});
  expect.activation("cls", cls, q_weight.scalar_type());
  expect.tensor("grad_out", grad_out, {batch, width});
  expect.saved("mean", mean, {batch, all});
  expect.saved("rstd", rstd, {batch, all});
  expect.saved("probs", probs, {batch, num_heads, all});
  expect.saved("context", context, {batch, num_heads, width});
  expect.saved("query", query, {batch, width});
  expect.saved("key_query", key_query, {batch, num_heads, width});
  const auto needs = expect.needs<ClsCrossAttentionNeeds>(list);
  expect.needed("norm_bias", needs.norm_bias, norm_bias);
  return needs;
}

// --- cls_fusion: cls (B, D_d), patches (B, N, D), out (B, D_d) ----------------------------------------------------------

inline void cls_fusion(Taken taken, const Tensor& cls, const Tensor& patches, const Tensor& proj_norm_weight,
                       const OptionalTensor& proj_norm_bias, const Tensor& proj_weight, const OptionalTensor& proj_bias,
                       const Tensor& norm_weight, const OptionalTensor& norm_bias, const Tensor& q_weight,
                       const OptionalTensor& q_bias, const Tensor& k_weight, const Tensor& v_weight,
                       const OptionalTensor& v_bias, const Tensor& out_weight, const OptionalTensor& out_bias,
                       const Tensor& revert_norm_weight, const OptionalTensor& revert_norm_bias,
                       const Tensor& revert_weight, const OptionalTensor& revert_bias, std::int64_t num_heads,
                       double eps) {
  const Expect expect("cls_fusion", taken, "patches", patches);
  expect.rank("cls", cls, 2);
  tokens(expect, patches, norm_weight, norm_bias, q_weight, k_weight, v_weight, num_heads);
  const std::int64_t own = cls.sizes()[1], width = patches.sizes()[2];
  const ScalarType dtype = q_weight.scalar_type();
  expect.tensor("cls", cls, {patches.sizes()[0], own});
  expect.activation("cls", cls, dtype);
  expect.vector("proj_norm_weight", proj_norm_weight, own);
  expect.vector("proj_norm_bias", proj_norm_bias, own);
  expect.tensor("proj_weight", proj_weight, {width, own}, dtype);
  expect.vector("proj_bias", proj_bias, width);
  expect.vector("q_bias", q_bias, width);
  expect.vector("v_bias", v_bias, width);
  expect.tensor("out_weight", out_weight, {width, width}, dtype);
  expect.vector("out_bias", out_bias, width);
  expect.vector("revert_norm_weight", revert_norm_weight, width);
  expect.vector("revert_norm_bias", revert_norm_bias, width);
  expect.tensor("revert_weight", revert_weight, {own, width}, dtype);
  expect.vector("revert_bias", revert_bias, own);
  expect.epsilon(eps);
}

// --- self_attention: qkv (B, N, 3 D) ------------------------------------------------------------------------------------

inline std::int64_t packed(const Expect& expect, const Tensor& qkv, std::int64_t num_heads) {
  expect.rank("qkv", qkv, 3);
  const std::int64_t width = qkv.sizes()[2] / 3;
  if (width * 3 != qkv.sizes()[2]) [[unlikely]]
    expect.fail("qkv", "three equal parts (B, N, 3 D)", "rows of " + std::to_string(qkv.sizes()[2]));
  expect.heads(num_heads, width);
  return width;
}

inline void self_attention(Taken taken, const Tensor& qkv, std::int64_t num_heads) {
  packed(Expect("self_attention", taken, "qkv", qkv), qkv, num_heads);
}

inline void self_attention_backward(Taken taken, const Tensor& grad_out, const Tensor& qkv, const Tensor& out,
                                    const Tensor& lse, std::int64_t num_heads) {
  const Expect expect("self_attention_backward", taken, "qkv", qkv);
  const std::int64_t width = packed(expect, qkv, num_heads), batch = qkv.sizes()[0], all = qkv.sizes()[1];
  expect.tensor("grad_out", grad_out, {batch, all, width}, qkv.scalar_type());
  expect.tensor("out", out, {batch, all, width}, qkv.scalar_type());
  expect.saved("lse", lse, {batch, num_heads, all});
}

// --- bicubic_resize: images (B, C, H, W) --------------------------------------------------------------------------------

inline void resized(const Expect& expect, const Tensor& images, std::int64_t height, std::int64_t width) {
  expect.rank("images", images, 4);
  expect.side("images' height", images.sizes()[2]);
  expect.side("images' width", images.sizes()[3]);
  expect.side("height", height);
  expect.side("width", width);
}

inline void bicubic_resize(Taken taken, const Tensor& images, std::int64_t height, std::int64_t width) {
  resized(Expect("bicubic_resize", taken, "images", images), images, height, width);
}

inline void bicubic_resize_backward(Taken taken, const Tensor& grad_out, const Tensor& images, std::int64_t height,
                                    std::int64_t width) {
  const Expect expect("bicubic_resize_backward", taken, "images", images);
  resized(expect, images, height, width);
  expect.tensor("grad_out", grad_out, {images.sizes()[0], images.sizes()[1], height, width}, images.scalar_type());
}

// --- patch_embed: images (B, C, H, W), weight (D, C, P, P), pos_embed (1, 1 + N, D) --------------------------------------

// The number of tokens of an image, 1 + N.
inline std::int64_t patches(const Expect& expect, const Tensor& images, const Tensor& weight,
                            const OptionalTensor& bias, const Tensor& cls_token, const Tensor& pos_embed,
                            std::int64_t height, std::int64_t width) {
  resized(expect, images, height, width);
  expect.rank("weight", weight, 4);
  const std::int64_t features = weight.sizes()[0], patch = weight.sizes()[3];
  expect.tensor("weight", weight, {features, images.sizes()[1], patch, patch});
  if (height % patch != 0) [[unlikely]]
    expect.fail("height", "a multiple of the patch's " + std::to_string(patch), std::to_string(height));
  if (width % patch != 0) [[unlikely]]
    expect.fail("width", "a multiple of the patch's " + std::to_string(patch), std::to_string(width));
  const std::int64_t all = 1 + (height / patch) * (width / patch);
  expect.vector("bias", bias, features);
  expect.tensor("cls_token", cls_token, {1, 1, features});
  expect.tensor("pos_embed", pos_embed, {1, all, features});
  expect.countable("images", images.sizes()[0], all);
  expect.countable("images", images.sizes()[0] * all, weight.numel() / features);
  expect.countable("weight", images.sizes()[0] * all, features);
  return all;
}

inline void patch_embed(Taken taken, const Tensor& images, const Tensor& weight, const OptionalTensor& bias,
                        const Tensor& cls_token, const Tensor& pos_embed, std::int64_t height, std::int64_t width) {
  patches(Expect("patch_embed", taken, "images", images), images, weight, bias, cls_token, pos_embed, height, width);
}

inline PatchEmbedNeeds patch_embed_backward(Taken taken, const Tensor& grad_out, const Tensor& images,
                                            const Tensor& weight, const OptionalTensor& bias, const Tensor& cls_token,
                                            const Tensor& pos_embed, std::int64_t height, std::int64_t width,
                                            const NeedsList& list) {
  const Expect expect("patch_embed_backward", taken, "images", images);
  const std::int64_t all = patches(expect, images, weight, bias, cls_token, pos_embed, height, width);
  expect.tensor("grad_out", grad_out, {images.sizes()[0], all, weight.sizes()[0]});
  const auto needs = expect.needs<PatchEmbedNeeds>(list);
  expect.needed("bias", needs.bias, bias);
  return needs;
}

}  // namespace crossvit::arguments
