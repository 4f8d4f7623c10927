// The native ops, the same on the CPU and on CUDA: the schema of each, its arguments under their names, and check(), which throws
// where shapes, dtypes and saved tensors do not go with each other, in the words of the contracts in crossvit_kernels/ops/<op>.py,
// before an op's function is called (torch_c/op.h). What is empty does not come here: the reference serves it. On the CPU a
// backward is told beside them whether the gradients of weights and biases shall be in float32 (`wide`, see cpu/ops.h); on CUDA
// every op is told whether products of float32 may be computed in TF32, which is a setting of PyTorch's that its C interface
// does not tell.
#pragma once

#include "expect.h"

namespace crossvit {

struct NormParams {
  const Tensor& weight;
  const OptionalTensor& bias;
};
struct LinearParams {
  const Tensor& weight;
  const OptionalTensor& bias;
};
// The factor of a residual branch: per sample or per channel.
struct ScaleParams {
  const OptionalTensor& values;
  bool per_sample;

  void check(const Expect& expect, const Tensor& residual) const {
    if (!values) return;
    if (per_sample) return expect.per_sample("scale", *values, residual);
    expect.tensor("scale", *values, {residual.sizes().back()});
  }
};

// x (..., D), a LayerNorm over its rows, and the weight (E, D) of the Linear behind it; gives the number of rows.
inline int64_t expect_normalized(const Expect& expect, const Tensor& x, const NormParams& norm, const char* name,
                                 const Tensor& weight) {
  expect.rows("x", x);
  const int64_t width = x.sizes().back();
  expect.vector("norm_weight", norm.weight, width);
  expect.vector("norm_bias", norm.bias, width);
  expect.matrix(name, weight, width);
  expect.activation("x", x, weight.scalar_type());
  return x.numel() / width;
}

// --- layer_norm_linear: x (..., D), weight (E, D) -----------------------------------------------------------------------

struct LayerNormLinear {
  static constexpr const char* schema =
      "layer_norm_linear(Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor weight, Tensor? bias, float eps, bool "
      "gelu_in, bool gelu_out, bool save) -> (Tensor out, Tensor mean, Tensor rstd, Tensor pre)";
  using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;
  const Tensor& x;
  NormParams norm;
  LinearParams linear;
  double eps;
  bool gelu_in, gelu_out, save;

  void check() const {
    const Expect expect(schema, "x", x);
    const int64_t rows = expect_normalized(expect, x, norm, "weight", linear.weight);
    expect.vector("bias", linear.bias, linear.weight.sizes()[0]);
    expect.epsilon(eps);
    expect.countable("x", rows, linear.weight.sizes()[0]);
  }
};

struct LayerNormLinearNeeds {
  bool x = false, norm_weight = false, norm_bias = false, weight = false, bias = false;
  bool below() const { return x || norm_weight || norm_bias; }
};

struct LayerNormLinearBackward {
  static constexpr const char* schema =
      "layer_norm_linear_backward(Tensor grad_out, Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor weight, "
      "Tensor mean, Tensor rstd, Tensor pre, bool gelu_in, bool gelu_out, bool[] needs) -> Tensor[]";
  const Tensor &grad_out, &x;
  NormParams norm;
  const Tensor &weight, &mean, &rstd, &pre;
  bool gelu_in, gelu_out;
  Needs<LayerNormLinearNeeds> needs;

  void check() const {
    const Expect expect(schema, "x", x);
    const int64_t rows = expect_normalized(expect, x, norm, "weight", weight), features = weight.sizes()[0];
    expect.countable("x", rows, x.sizes().back());
    expect.countable("grad_out", rows, features);
    expect.beside("grad_out", grad_out, x, features);
    expect.saved("mean", mean, {rows});
    expect.saved("rstd", rstd, {rows});
    expect.saved("pre", pre, {gelu_out ? rows : 0, features}, weight.scalar_type());
    expect.needs(needs);
    expect.needed("norm_bias", needs.norm_bias, norm.bias);
  }
};

// --- linear_residual: x (..., K), weight (E, K), residual (..., E) ------------------------------------------------------

inline int64_t expect_linear(const Expect& expect, const Tensor& x, const LinearParams& linear) {
  expect.rows("x", x);
  expect.matrix("weight", linear.weight, x.sizes().back());
  expect.of_dtype("x", x, linear.weight.scalar_type());
  expect.vector("bias", linear.bias, linear.weight.sizes()[0]);
  return x.numel() / x.sizes().back();
}

struct LinearResidual {
  static constexpr const char* schema =
      "linear_residual(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? scale, bool per_sample) -> "
      "Tensor";
  const Tensor& x;
  LinearParams linear;
  const Tensor& residual;
  ScaleParams scale;

  void check() const {
    const Expect expect(schema, "x", x);
    const int64_t rows = expect_linear(expect, x, linear), features = linear.weight.sizes()[0];
    expect.beside("residual", residual, x, features);
    scale.check(expect, residual);
    expect.countable("x", rows, features);
  }
};

struct LinearResidualNeeds {
  bool x = false, weight = false, bias = false, scale = false;
};

struct LinearResidualBackward {
  static constexpr const char* schema =
      "linear_residual_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, Tensor? scale, bool "
      "per_sample, bool[] needs) -> Tensor[]";
  const Tensor &grad_out, &x;
  LinearParams linear;
  ScaleParams scale;
  Needs<LinearResidualNeeds> needs;

  void check() const {
    const Expect expect(schema, "x", x);
    const int64_t rows = expect_linear(expect, x, linear), features = linear.weight.sizes()[0];
    expect.beside("grad_out", grad_out, x, features);
    scale.check(expect, grad_out);
    expect.countable("x", rows, x.sizes().back());
    expect.countable("grad_out", rows, features);
    expect.needs(needs);
    expect.needed("bias", needs.bias, linear.bias);
    expect.needed("scale", needs.scale, scale.values);
  }
};

// --- layer_norm_mlp: x (..., D), w1 (hidden, D), w2 (D, hidden) ---------------------------------------------------------

struct LayerNormMlp {
  static constexpr const char* schema =
      "layer_norm_mlp(Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, "
      "float eps, Tensor? scale, bool per_sample, bool save) -> (Tensor out, Tensor mean, Tensor rstd, Tensor pre)";
  using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;
  const Tensor& x;
  NormParams norm;
  LinearParams first, second;
  double eps;
  ScaleParams scale;
  bool save;

  void check() const {
    const Expect expect(schema, "x", x);
    const int64_t rows = expect_normalized(expect, x, norm, "w1", first.weight);
    const int64_t width = x.sizes().back(), hidden = first.weight.sizes()[0];
    expect.vector("b1", first.bias, hidden);
    expect.tensor("w2", second.weight, {width, hidden}, first.weight.scalar_type());
    expect.vector("b2", second.bias, width);
    expect.epsilon(eps);
    scale.check(expect, x);
    expect.countable("x", rows, hidden);
  }
};

struct LayerNormMlpNeeds {
  bool x = false, norm_weight = false, norm_bias = false, w1 = false, b1 = false, w2 = false, b2 = false, scale = false;
};

struct LayerNormMlpBackward {
  static constexpr const char* schema =
      "layer_norm_mlp_backward(Tensor grad_out, Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor w1, Tensor "
      "w2, Tensor? b2, Tensor? scale, bool per_sample, Tensor mean, Tensor rstd, Tensor pre, bool[] needs) -> Tensor[]";
  const Tensor &grad_out, &x;
  NormParams norm;
  const Tensor& w1;
  LinearParams second;
  ScaleParams scale;
  const Tensor &mean, &rstd, &pre;
  Needs<LayerNormMlpNeeds> needs;

  void check() const {
    const Expect expect(schema, "x", x);
    const int64_t rows = expect_normalized(expect, x, norm, "w1", w1);
    const int64_t width = x.sizes().back(), hidden = w1.sizes()[0];
    expect.countable("x", rows, width);
    expect.countable("w1", rows, hidden);
    expect.tensor("w2", second.weight, {width, hidden}, w1.scalar_type());
    expect.vector("b2", second.bias, width);
    scale.check(expect, x);
    expect.beside("grad_out", grad_out, x, width);
    expect.saved("mean", mean, {rows});
    expect.saved("rstd", rstd, {rows});
    expect.saved("pre", pre, {rows, hidden}, w1.scalar_type());
    expect.needs(needs);
    expect.needed("norm_bias", needs.norm_bias, norm.bias);
    expect.needed("b2", needs.b2, second.bias);
    expect.needed("scale", needs.scale, scale.values);
  }
};

}  // namespace crossvit
