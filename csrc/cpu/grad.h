// Backward of linear.h and mlp.h, a panel of rows at a time: the gradient of the input, and the operands that weight_grad.h
// makes the weights' gradients of. Products run on the pairs of a bfloat16 weight where the machine has them, everything else
// in float32; no two tasks add to the same memory.
#pragma once

#include "linear.h"
#include "operands.h"

namespace crossvit::CROSSVIT_ISA {

// scale * grad * gelu'(pre), transposed: to[e][r] for columns [e0, e0 + columns) of rows [m, m + count).
inline void load_grad_panel(const Rows& grad, const Rows& pre, bool gelu_out, const Scale& scale, int64_t m,
                            int64_t count, int64_t e0, int64_t columns, float* to, float* pre_panel, int64_t lanes) {
  load_transposed(grad, m, count, e0, columns, to, lanes);
  if (scale.kind == Scale::channel) {
    for (int64_t e = 0; e < columns; e++) {
      const float factor = element(scale.values, e0 + e);
      for (int64_t r = 0; r < lanes; r += VL) store(to + e * lanes + r, load(to + e * lanes + r) * factor);
    }
  } else if (scale.kind == Scale::sample) {
    for (int64_t r0 = 0; r0 < lanes; r0 += VL) {
      Vec factor{};
      for (int64_t r = 0; r < VL && r0 + r < count; r++)
        factor[r] = element(scale.values, (m + r0 + r) / scale.rows_per_sample);
      for (int64_t e = 0; e < columns; e++) store(to + e * lanes + r0, load(to + e * lanes + r0) * factor);
    }
  }
  if (gelu_out) {
    load_transposed(pre, m, count, e0, columns, pre_panel, lanes);
    for (int64_t i = 0; i < columns * lanes; i += VL)
      store(to + i, load(to + i) * gelu_derivative(load(pre_panel + i)));
  }
}

// From dy (gradient of the normalised and activated rows) to the gradient of x, written to grad_x (+ add).
template <int NV>
inline void finish_grad_input(const Rows& x, const Rows& grad_x, const Rows& add, const Norm& norm, bool gelu_in,
                              int64_t depth, int64_t m, int64_t count, const float* norm_weight, const float* norm_bias,
                              float* dy, float* x_panel, float* grad_norm_weight, float* grad_norm_bias) {
  constexpr int64_t lanes = NV * VL;
  if (norm.present || gelu_in) load_transposed(x, m, count, 0, depth, x_panel, lanes);
  if (gelu_in) {
    Vec mean[NV] = {}, rstd[NV];
    for (int v = 0; v < NV; v++) rstd[v] = broadcast(1.0f);
    if (norm.present) load_statistics<NV>(norm, m, count, mean, rstd);
    for (int64_t k = 0; k < depth; k++)
      for (int v = 0; v < NV; v++) {
        const Vec normalized = (load(x_panel + k * lanes + v * VL) - mean[v]) * rstd[v];
        const Vec y = norm.present ? normalized * norm_weight[k] + norm_bias[k] : normalized;
        float* at = dy + k * lanes + v * VL;
        store(at, load(at) * gelu_derivative(y));
      }
  }
  if (norm.present)
    normalize_panel_backward<NV>(x_panel, dy, depth, norm, norm_weight, m, count, grad_norm_weight, grad_norm_bias);
  if (!grad_x.data) return;
  const PanelRows to(grad_x, m, count), plus(add, m, count);
  for (int64_t k = 0; k < depth; k += VL) {
    const int n = lanes_in(depth - k);
    for_each_row<NV>(dy + k * lanes, lanes, count, [&](int64_t r, Vec g) {
      if (add.data) g += plus.load(r, k, n);
      to.store(r, k, g, n);
    });
  }
}

// How rows are cut into panels here: into an even number, since two cores would wait for each other at the end of an odd one.
struct GradSplit {
  int64_t vectors, panels;
  explicit GradSplit(int64_t rows) : vectors(ceil_div(rows, VL)), panels(ceil_div(vectors, kPanelVectors)) {
    if (panels > 1 && panels % 2 == 1) panels++;
  }
  int64_t first(int64_t panel) const { return ceil_div(panel * vectors, panels) * VL; }
  int vectors_of(int64_t panel) const { return static_cast<int>((first(panel + 1) - first(panel)) / VL); }
};

// What entered a product, LayerNorm's weight and bias coming as floats, as a right operand.
inline void write_input(void* operand, const OperandShape& shape, const Rows& x, const Norm& norm, bool gelu_in,
                        const float* norm_weight, const float* norm_bias, int64_t m, int64_t count) {
  const PanelRows from(x, m, count);
  write_right(operand, shape, m, count, [&](int64_t r, int64_t k, int n) {
    Vec v = from.load(r, k, n);
    if (norm.present) v = (v - norm.mean[m + r]) * norm.rstd[m + r] * load(norm_weight + k) + load(norm_bias + k);
    return gelu_in ? gelu(v) : v;
  });
}

struct LinearGradScratch : Scratch<LinearGradArgs> {
  int64_t most = round_up(larger(a.in, a.out_features), VL) * kPanelVectors * VL;
  float* grad = floats(most);
  float* other = floats(most);  // pre-activations, then x
  float* dy = floats(round_up(a.in, VL) * kPanelVectors * VL);
  float* widened = floats(kBlock * a.out_features);
  float *norm_weight = floats(a.in + VL), *norm_bias = floats(a.in + VL);
};

inline Plan linear_grad_plan(const LinearGradArgs& a, int64_t) { return {GradSplit(a.rows).panels}; }
inline void linear_grad_run(const LinearGradArgs& a, const Plan&, int64_t task, const LinearGradScratch& s) {
  const GradSplit split(a.rows);
  const int64_t m = split.first(task), count = smaller(split.first(task + 1), a.rows) - m;
  if (a.norm.present) {
    load_vector(a.norm.weight, 0, a.in, 1.0f, s.norm_weight);
    load_vector(a.norm.bias, 0, a.in, 0.0f, s.norm_bias);
  }
  if (a.right)
    write_input(a.right, OperandShape(a.rows, a.in, a.products), a.x, a.norm, a.gelu_in, s.norm_weight, s.norm_bias, m,
                count);
  with_vectors(split.vectors_of(task), [&]<int NV>() {
    constexpr int64_t lanes = NV * VL;
    const Panel grad{s.grad, lanes, multiplies_pairs(a.products, a.out_features)};
    // What came as bfloat16 and stays as it is needs no packing.
    const bool as_it_is = grad.pairs && a.grad.dtype == DType::bfloat16 && !a.gelu_out && a.scale.kind == Scale::none;
    if (as_it_is)
      load_pairs(a.grad, m, count, 0, a.out_features, s.grad, lanes);
    else
      load_grad_panel(a.grad, a.pre, a.gelu_out, a.scale, m, count, 0, a.out_features, s.grad, s.other, lanes);
    if (a.left)
      write_left<NV>(a.left, OperandShape(a.rows, a.out_features, a.products), m, count, 0, a.out_features, s.grad,
                     as_it_is);
    if (!a.weight_t.data) return;
    if (grad.pairs && !as_it_is) pack_pairs(s.grad, lanes, a.out_features);
    multiply_columns<NV>(a.weight_t, 0, a.in, a.out_features, grad, s.dy, s.widened);
    finish_grad_input<NV>(a.x, a.grad_x, {}, a.norm, a.gelu_in, a.in, m, count, s.norm_weight, s.norm_bias, s.dy,
                          s.other, a.grad_norm_weight ? a.grad_norm_weight + task * a.in : nullptr,
                          a.grad_norm_bias ? a.grad_norm_bias + task * a.in : nullptr);
  });
}

constexpr int64_t kHiddenStep = 2 * VL;  // hidden features at a time; of bfloat16 a vector of pairs

struct MlpGradScratch : Scratch<MlpGradArgs> {
  static constexpr int64_t lanes = kPanelVectors * VL;
  float* grad = floats(round_up(a.width, VL) * lanes);
  float* hidden = floats(round_up(a.hidden, VL) * lanes);
  float* other = floats(round_up(larger(kHiddenStep, a.width), VL) * lanes);
  float* c = floats(kHiddenStep * lanes);
  float* dy = floats(round_up(a.width, VL) * lanes);
  float* widened = floats(kBlock * larger(a.width, a.hidden));
  float *norm_weight = floats(a.width + VL), *norm_bias = floats(a.width + VL), *channels = floats(a.width + VL);
};

// One step of mlp_grad_hidden: hidden features [h, h + n) from the gradient c of their activations.
template <int NV>
inline void mlp_grad_step(const MlpGradArgs& a, int64_t m, int64_t count, int64_t h, int64_t n, float* c,
                          const MlpGradScratch& s) {
  constexpr int64_t lanes = NV * VL;
  load_transposed(a.pre, m, count, h, n, s.other, lanes);
  for (int64_t i = 0; i < n * lanes; i += VL) {
    Vec value, derivative;
    gelu_and_derivative(load(s.other + i), value, derivative);
    store(s.other + i, value);
    store(c + i, load(c + i) * derivative);
  }
  const OperandShape shape(a.rows, a.hidden, a.products);
  if (a.left1) write_left<NV>(a.left1, shape, m, count, h, n, c);
  if (a.left2) write_left<NV>(a.left2, shape, m, count, h, n, s.other);
}

// The same in bfloat16, n even: everything stays in registers from c to the panel and the operands.
template <int NV>
inline void mlp_grad_step_pairs(const MlpGradArgs& a, int64_t m, int64_t count, int64_t h, int64_t n, const float* c,
                                const MlpGradScratch& s) {
  constexpr int64_t lanes = NV * VL;
  load_pairs(a.pre, m, count, h, n, s.other, lanes);
  const OperandShape shape(a.rows, a.hidden, a.products);
  for (int64_t v = 0; v < NV; v++) {
    const bool left1 = a.left1 && v * VL < count, left2 = a.left2 && v * VL < count;
    LeftRows grad(a.left1, shape, m + v * VL, h), activation(a.left2, shape, m + v * VL, h);
    for (int64_t e = 0; e < n; e += 2) {
      const Vec pre = load(s.other + e / 2 * lanes + v * VL);
      const float* at = c + e * lanes + v * VL;
      Vec even_value, odd_value, even_derivative, odd_derivative;
      gelu_and_derivative_bf16(even_of(pre), even_value, even_derivative);
      gelu_and_derivative_bf16(odd_of(pre), odd_value, odd_derivative);
      const Vec even = load(at) * even_derivative, odd = load(at + lanes) * odd_derivative;
      store(s.hidden + (h + e) / 2 * lanes + v * VL, pair(even, odd));
      if (left1) {
        store(reinterpret_cast<Bf16*>(grad.to), even);
        store(reinterpret_cast<Bf16*>(grad.to + grad.stride), odd);
        grad.to += 2 * grad.stride;
      }
      if (left2) {
        store(reinterpret_cast<Bf16*>(activation.to), even_value);
        store(reinterpret_cast<Bf16*>(activation.to + activation.stride), odd_value);
        activation.to += 2 * activation.stride;
      }
    }
  }
}

// The gradient of the hidden pre-activations, as the panel that meets w1, and the operands that it and the activations are.
template <int NV>
inline Panel mlp_grad_hidden(const MlpGradArgs& a, int64_t m, int64_t count, const MlpGradScratch& s) {
  constexpr int64_t lanes = NV * VL;
  load_grad_panel(a.grad, {}, false, a.scale, m, count, 0, a.width, s.grad, nullptr, lanes);
  const Panel grad{s.grad, lanes, multiplies_pairs(a.products, a.width)};
  if (grad.pairs) pack_pairs(s.grad, lanes, a.width);
  const Panel hidden{s.hidden, lanes, multiplies_pairs(a.products, a.hidden)};
  const OperandShape shape(a.rows, a.hidden, a.products);
  for (int64_t h = 0; h < a.hidden; h += kHiddenStep) {
    const int64_t n = smaller(a.hidden - h, kHiddenStep);
    for (int64_t v = 0; v * VL < count; v += 2) {
      if (a.left1) LeftRows(a.left1, shape, m + v * VL, h).prefetch(n);
      if (a.left2) LeftRows(a.left2, shape, m + v * VL, h).prefetch(n);
    }
    float* c = hidden.pairs ? s.c : s.hidden + h * lanes;
    // Without w2 only the activations are wanted.
    if (a.w2_t.data) multiply_columns<NV>(a.w2_t, h, n, a.width, grad, c, s.widened);
    if (hidden.pairs)
      mlp_grad_step_pairs<NV>(a, m, count, h, n, c, s);
    else
      mlp_grad_step<NV>(a, m, count, h, n, c, s);
  }
  return hidden;
}

// The rows of the gradient with their factor, as a right operand.
inline void write_scaled(const MlpGradArgs& a, int64_t m, int64_t count, float* channels) {
  if (a.scale.kind == Scale::channel) load_vector(a.scale.values, 0, a.width, 0.0f, channels);
  const PanelRows grad(a.grad, m, count);
  write_right(a.right2, OperandShape(a.rows, a.width, a.products), m, count, [&](int64_t r, int64_t k, int n) {
    const Vec g = grad.load(r, k, n);
    return a.scale.kind == Scale::none ? g : g * scale_of(a.scale, channels, m + r, k);
  });
}

inline Plan mlp_grad_plan(const MlpGradArgs& a, int64_t) { return {GradSplit(a.rows).panels}; }
inline void mlp_grad_run(const MlpGradArgs& a, const Plan&, int64_t task, const MlpGradScratch& s) {
  const GradSplit split(a.rows);
  const int64_t m = split.first(task), count = smaller(split.first(task + 1), a.rows) - m;
  load_vector(a.norm.weight, 0, a.width, 1.0f, s.norm_weight);
  load_vector(a.norm.bias, 0, a.width, 0.0f, s.norm_bias);
  if (a.right1)
    write_input(a.right1, OperandShape(a.rows, a.width, a.products), a.x, a.norm, false, s.norm_weight, s.norm_bias, m,
                count);
  if (a.right2) write_scaled(a, m, count, s.channels);
  with_vectors(split.vectors_of(task), [&]<int NV>() {
    const Panel hidden = mlp_grad_hidden<NV>(a, m, count, s);
    if (!a.w1_t.data) return;
    multiply_columns<NV>(a.w1_t, 0, a.width, a.hidden, hidden, s.dy, s.widened);
    finish_grad_input<NV>(a.x, a.grad_x, a.grad, a.norm, false, a.width, m, count, s.norm_weight, s.norm_bias, s.dy,
                          s.other, a.grad_norm_weight ? a.grad_norm_weight + task * a.width : nullptr,
                          a.grad_norm_bias ? a.grad_norm_bias + task * a.width : nullptr);
  });
}

// --- transpose -------------------------------------------------------------------------------------------------------

constexpr int64_t kTransposeRows = 2 * VL;  // a cache line of bfloat16

inline Plan transpose_plan(const TransposeArgs& a, int64_t) { return {ceil_div(a.rows, kTransposeRows)}; }
struct TransposeScratch : Scratch<TransposeArgs> {
  float* block = floats(round_up(a.columns, VL) * kTransposeRows);
};
inline void transpose_run(const TransposeArgs& a, const Plan&, int64_t task, const TransposeScratch& s) {
  const int64_t m = task * kTransposeRows, count = smaller(a.rows - m, kTransposeRows);
  load_transposed(a.from, m, count, 0, a.columns, s.block, kTransposeRows);
  for (int64_t k = 0; k < a.columns; k++) {
    char* to = static_cast<char*>(a.to) + k * a.rows * size_of(a.to_dtype);
    for (int64_t r = 0; r < count; r += VL)
      store_as(a.to_dtype, to, m + r, load(s.block + k * kTransposeRows + r), lanes_in(count - r));
  }
}

}  // namespace crossvit::CROSSVIT_ISA
