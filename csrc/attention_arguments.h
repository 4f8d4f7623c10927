// The native ops as in arguments.h: those of attention.
#pragma once

#include "arguments.h"

namespace crossvit {

// --- cls_cross_attention: cls (B, D), patches (B, N, D), weights (D, D) -------------------------------------------------

// The weights of the three projections.
inline void expect_tokens(const Expect& expect, const Tensor& patches, const NormParams& norm, const Tensor& q_weight,
                          const Tensor& k_weight, const Tensor& v_weight, int64_t num_heads) {
  expect.rank("patches", patches, 3);
  const int64_t width = patches.sizes()[2];
  expect.vector("norm_weight", norm.weight, width);
  expect.vector("norm_bias", norm.bias, width);
  expect.tensor("q_weight", q_weight, {width, width});
  const ScalarType dtype = q_weight.scalar_type();
  expect.tensor("k_weight", k_weight, {width, width}, dtype);
  expect.tensor("v_weight", v_weight, {width, width}, dtype);
  expect.activation("patches", patches, dtype);
  expect.heads(num_heads, width);
}

struct ClsCrossAttention {
  static constexpr const char* schema =
      "cls_cross_attention(Tensor cls, Tensor patches, Tensor norm_weight, Tensor? norm_bias, Tensor q_weight, Tensor? "
      "q_bias, Tensor k_weight, Tensor v_weight, Tensor? v_bias, int num_heads, float eps, bool save) -> (Tensor out, "
      "Tensor mean, Tensor rstd, Tensor probs, Tensor context, Tensor query, Tensor key_query)";
  using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
  const Tensor &cls, &patches;
  NormParams norm;
  LinearParams q;
  const Tensor& k_weight;
  LinearParams v;
  int64_t num_heads;
  double eps;
  bool save;

  void check() const {
    const Expect expect(schema, "patches", patches);
    expect_tokens(expect, patches, norm, q.weight, k_weight, v.weight, num_heads);
    const int64_t width = patches.sizes()[2];
    expect.tensor("cls", cls, {patches.sizes()[0], width});
    expect.activation("cls", cls, q.weight.scalar_type());
    expect.vector("q_bias", q.bias, width);
    expect.vector("v_bias", v.bias, width);
    expect.epsilon(eps);
  }
};

struct ClsCrossAttentionNeeds {
  bool cls = false, patches = false, norm_weight = false, norm_bias = false;
  bool q_weight = false, q_bias = false, k_weight = false, k_bias = false, v_weight = false, v_bias = false;
};

// The gradients themselves; one that is not wanted is not defined.
struct ClsCrossAttentionGradients {
  Tensor cls, patches, norm_weight, norm_bias, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias;
  // Those that are wanted, in the order of the list.
  std::vector<Tensor> in_order() const {
    std::vector<Tensor> result;
    for (const Tensor* gradient :
         {&cls, &patches, &norm_weight, &norm_bias, &q_weight, &q_bias, &k_weight, &k_bias, &v_weight, &v_bias})
      if (gradient->defined()) result.push_back(*gradient);
    return result;
  }
};

struct ClsCrossAttentionBackward {
  static constexpr const char* schema =
      "cls_cross_attention_backward(Tensor grad_out, Tensor cls, Tensor patches, Tensor norm_weight, Tensor? "
      "norm_bias, Tensor q_weight, Tensor k_weight, Tensor v_weight, Tensor mean, Tensor rstd, Tensor probs, "
      "Tensor context, Tensor query, Tensor key_query, int num_heads, bool[] needs) -> Tensor[]";
  const Tensor &grad_out, &cls, &patches;
  NormParams norm;
  const Tensor &q_weight, &k_weight, &v_weight;
  const Tensor &mean, &rstd, &probs, &context, &query, &key_query;  // what the forward saved
  int64_t num_heads;
  Needs<ClsCrossAttentionNeeds> needs;

  void check() const {
    const Expect expect(schema, "patches", patches);
    expect_tokens(expect, patches, norm, q_weight, k_weight, v_weight, num_heads);
    const int64_t batch = patches.sizes()[0], all = 1 + patches.sizes()[1], width = patches.sizes()[2];
    expect.tensor("cls", cls, {batch, width});
    expect.activation("cls", cls, q_weight.scalar_type());
    expect.tensor("grad_out", grad_out, {batch, width});
    expect.saved("mean", mean, {batch, all});
    expect.saved("rstd", rstd, {batch, all});
    expect.saved("probs", probs, {batch, num_heads, all});
    expect.saved("context", context, {batch, num_heads, width});
    expect.saved("query", query, {batch, width});
    expect.saved("key_query", key_query, {batch, num_heads, width});
    expect.needs(needs);
    expect.needed("norm_bias", needs.norm_bias, norm.bias);
  }
};

// --- cls_fusion: cls (B, D_d), patches (B, N, D), out (B, D_d) ----------------------------------------------------------

struct ClsFusion {
  static constexpr const char* schema =
      "cls_fusion(Tensor cls, Tensor patches, Tensor proj_norm_weight, Tensor? proj_norm_bias, Tensor proj_weight, "
      "Tensor? proj_bias, Tensor norm_weight, Tensor? norm_bias, Tensor q_weight, Tensor? q_bias, Tensor k_weight, "
      "Tensor v_weight, Tensor? v_bias, Tensor out_weight, Tensor? out_bias, Tensor revert_norm_weight, Tensor? "
      "revert_norm_bias, Tensor revert_weight, Tensor? revert_bias, int num_heads, float eps) -> Tensor";
  const Tensor &cls, &patches;
  NormParams proj_norm;
  LinearParams proj;
  NormParams norm;
  LinearParams q;
  const Tensor& k_weight;
  LinearParams v, out;
  NormParams revert_norm;
  LinearParams revert;
  int64_t num_heads;
  double eps;

  void check() const {
    const Expect expect(schema, "patches", patches);
    expect.rank("cls", cls, 2);
    expect_tokens(expect, patches, norm, q.weight, k_weight, v.weight, num_heads);
    const int64_t own = cls.sizes()[1], width = patches.sizes()[2];
    const ScalarType dtype = q.weight.scalar_type();
    expect.tensor("cls", cls, {patches.sizes()[0], own});
    expect.activation("cls", cls, dtype);
    expect.vector("proj_norm_weight", proj_norm.weight, own);
    expect.vector("proj_norm_bias", proj_norm.bias, own);
    expect.tensor("proj_weight", proj.weight, {width, own}, dtype);
    expect.vector("proj_bias", proj.bias, width);
    expect.vector("q_bias", q.bias, width);
    expect.vector("v_bias", v.bias, width);
    expect.tensor("out_weight", out.weight, {width, width}, dtype);
    expect.vector("out_bias", out.bias, width);
    expect.vector("revert_norm_weight", revert_norm.weight, width);
    expect.vector("revert_norm_bias", revert_norm.bias, width);
    expect.tensor("revert_weight", revert.weight, {own, width}, dtype);
    expect.vector("revert_bias", revert.bias, own);
    expect.epsilon(eps);
  }
};

// --- self_attention, on the CPU alone: qkv (B, N, 3 D) ------------------------------------------------------------------

inline int64_t expect_packed(const Expect& expect, const Tensor& qkv, int64_t num_heads) {
  expect.rank("qkv", qkv, 3);
  const int64_t width = qkv.sizes()[2] / 3;
  if (width * 3 != qkv.sizes()[2]) [[unlikely]]
    expect.fail("qkv", "three equal parts (B, N, 3 D)", "rows of " + std::to_string(qkv.sizes()[2]));
  expect.heads(num_heads, width);
  return width;
}

struct SelfAttention {
  static constexpr const char* schema =
      "self_attention(Tensor qkv, int num_heads, bool save) -> (Tensor out, Tensor lse)";
  using Results = std::tuple<Tensor, Tensor>;
  const Tensor& qkv;
  int64_t num_heads;
  bool save;

  void check() const { expect_packed(Expect(schema, "qkv", qkv), qkv, num_heads); }
};

struct SelfAttentionBackward {
  static constexpr const char* schema =
      "self_attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, int num_heads) -> Tensor";
  const Tensor &grad_out, &qkv, &out, &lse;
  int64_t num_heads;

  void check() const {
    const Expect expect(schema, "qkv", qkv);
    const int64_t width = expect_packed(expect, qkv, num_heads), batch = qkv.sizes()[0], all = qkv.sizes()[1];
    expect.tensor("grad_out", grad_out, {batch, all, width}, qkv.scalar_type());
    expect.tensor("out", out, {batch, all, width}, qkv.scalar_type());
    expect.saved("lse", lse, {batch, num_heads, all});
  }
};

}  // namespace crossvit
