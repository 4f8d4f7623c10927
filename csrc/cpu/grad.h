// Backward of linear.h and mlp.h: the gradient of the input, a panel of rows at a time, and of the weights, a block of the
// weight at a time with all rows running through it. All arithmetic is float32; no two tasks add to the same memory.
#pragma once

#include "linear.h"

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
    const int n = static_cast<int>(smaller(depth - k, VL));
    for_each_row<NV>(dy + k * lanes, lanes, count, [&](int64_t r, Vec g) {
      if (add.data) g += plus.load(r, k, n);
      to.store(r, k, g, n);
    });
  }
}

struct LinearGradInputScratch {
  float *grad, *other, *dy, *norm_weight, *norm_bias;
  int64_t bytes;
  LinearGradInputScratch(const LinearGradInputArgs& a, char* base) {
    Arena arena{base};
    const int64_t most = round_up(larger(a.in, a.out_features), VL) * kPanelVectors * VL;
    grad = arena.floats(most);
    other = arena.floats(most);  // pre-activations, then x
    dy = arena.floats(round_up(a.in, VL) * kPanelVectors * VL);
    norm_weight = arena.floats(a.in + VL);
    norm_bias = arena.floats(a.in + VL);
    bytes = arena.used;
  }
};

inline int64_t linear_grad_input_tasks(LinearGradInputArgs& a, int64_t) { return PanelSplit(a.rows).panels; }
inline int64_t linear_grad_input_scratch(const LinearGradInputArgs& a) {
  return LinearGradInputScratch(a, nullptr).bytes;
}
inline void linear_grad_input_run(const LinearGradInputArgs& a, int64_t task, char* scratch) {
  const LinearGradInputScratch s(a, scratch);
  const PanelSplit split(a.rows);
  const int64_t m = split.first(task), count = smaller(split.first(task + 1), a.rows) - m;
  if (a.norm.present) {
    load_vector(a.norm.weight, 0, a.in, 1.0f, s.norm_weight);
    load_vector(a.norm.bias, 0, a.in, 0.0f, s.norm_bias);
  }
  with_vectors(split.vectors_of(task), [&]<int NV>() {
    constexpr int64_t lanes = NV * VL;
    load_grad_panel(a.grad, a.pre, a.gelu_out, a.scale, m, count, 0, a.out_features, s.grad, s.other, lanes);
    const Panel grad{s.grad, lanes, false};
    for (int64_t k = 0; k < a.in; k += kBlock)
      multiply_block<NV>(a.weight_t, k, a.in - k, a.out_features, grad, s.dy + k * lanes, lanes, nullptr);
    finish_grad_input<NV>(a.x, a.grad_x, {}, a.norm, a.gelu_in, a.in, m, count, s.norm_weight, s.norm_bias, s.dy,
                          s.other, a.grad_norm_weight ? a.grad_norm_weight + task * a.in : nullptr,
                          a.grad_norm_bias ? a.grad_norm_bias + task * a.in : nullptr);
  });
}

struct MlpGradInputScratch {
  float *grad, *hidden, *other, *dy, *norm_weight, *norm_bias;
  int64_t bytes;
  MlpGradInputScratch(const MlpGradInputArgs& a, char* base) {
    Arena arena{base};
    const int64_t lanes = kPanelVectors * VL;
    grad = arena.floats(round_up(a.width, VL) * lanes);
    hidden = arena.floats(round_up(a.hidden, VL) * lanes);
    other = arena.floats(round_up(larger(VL, a.width), VL) * lanes);
    dy = arena.floats(round_up(a.width, VL) * lanes);
    norm_weight = arena.floats(a.width + VL);
    norm_bias = arena.floats(a.width + VL);
    bytes = arena.used;
  }
};

inline int64_t mlp_grad_input_tasks(MlpGradInputArgs& a, int64_t) { return PanelSplit(a.rows).panels; }
inline int64_t mlp_grad_input_scratch(const MlpGradInputArgs& a) { return MlpGradInputScratch(a, nullptr).bytes; }
inline void mlp_grad_input_run(const MlpGradInputArgs& a, int64_t task, char* scratch) {
  const MlpGradInputScratch s(a, scratch);
  const PanelSplit split(a.rows);
  const int64_t m = split.first(task), count = smaller(split.first(task + 1), a.rows) - m;
  load_vector(a.norm.weight, 0, a.width, 1.0f, s.norm_weight);
  load_vector(a.norm.bias, 0, a.width, 0.0f, s.norm_bias);
  with_vectors(split.vectors_of(task), [&]<int NV>() {
    constexpr int64_t lanes = NV * VL;
    load_grad_panel(a.grad, {}, false, a.scale, m, count, 0, a.width, s.grad, nullptr, lanes);
    const Panel grad{s.grad, lanes, false}, hidden{s.hidden, lanes, false};
    const PanelRows pre(a.pre, m, count), grad_hidden(a.grad_hidden, m, count);
    for (int64_t h = 0; h < a.hidden; h += VL) {
      const int64_t n = smaller(a.hidden - h, VL);
      float* c = s.hidden + h * lanes;
      for (int64_t e = 0; e < n; e += kBlock)
        multiply_block<NV>(a.w2_t, h + e, n - e, a.width, grad, c + e * lanes, lanes, nullptr);
      load_transposed(a.pre, m, count, h, n, s.other, lanes);
      for (int64_t i = 0; i < n * lanes; i += VL) store(c + i, load(c + i) * gelu_derivative(load(s.other + i)));
      if (a.grad_hidden.data)
        for_each_row<NV>(c, lanes, count, [&](int64_t r, Vec g) { grad_hidden.store(r, h, g, static_cast<int>(n)); });
    }
    for (int64_t k = 0; k < a.width; k += kBlock)
      multiply_block<NV>(a.w1_t, k, a.width - k, a.hidden, hidden, s.dy + k * lanes, lanes, nullptr);
    finish_grad_input<NV>(a.x, a.grad_x, a.grad, a.norm, false, a.width, m, count, s.norm_weight, s.norm_bias, s.dy,
                          s.other, a.grad_norm_weight ? a.grad_norm_weight + task * a.width : nullptr,
                          a.grad_norm_bias ? a.grad_norm_bias + task * a.width : nullptr);
  });
}

// --- weights ---------------------------------------------------------------------------------------------------------

constexpr int64_t kRowBlock = 192;  // rows that run through a block of the weight at a time

struct WeightGradScratch {
  float *grad, *pre, *x, *c, *norm_weight, *norm_bias, *bias;
  int64_t columns, ld, bytes;  // of x and c: columns in whole vectors, floats from row to row
  WeightGradScratch(const WeightGradArgs& a, char* base) {
    Arena arena{base};
    columns = round_up(a.in_chunk, VL);
    ld = spread(columns);
    const int64_t out = round_up(a.out_chunk, VL);
    grad = arena.floats(out * kRowBlock);
    pre = arena.floats(a.gelu_out ? out * kRowBlock : 0);
    x = arena.floats(kRowBlock * ld);
    c = arena.floats(out * ld);
    norm_weight = arena.floats(a.in_chunk + VL);
    norm_bias = arena.floats(a.in_chunk + VL);
    bias = arena.floats(out);
    bytes = arena.used;
  }
};

inline int64_t weight_grad_tasks(WeightGradArgs& a, int64_t threads) {
  a.in_chunk = smaller(a.in, 384);
  const int64_t in_chunks = ceil_div(a.in, a.in_chunk);
  a.in_chunk = round_up(ceil_div(a.in, in_chunks), VL);
  int64_t out_chunks = larger(ceil_div(a.out_features, 96), ceil_div(4 * threads, in_chunks));
  out_chunks = smaller(out_chunks, ceil_div(a.out_features, kBlock));
  a.out_chunk = round_up(ceil_div(a.out_features, out_chunks), kBlock);
  return ceil_div(a.out_features, a.out_chunk) * ceil_div(a.in, a.in_chunk);
}
inline int64_t weight_grad_scratch(const WeightGradArgs& a) { return WeightGradScratch(a, nullptr).bytes; }

// Columns [k0, k0 + n) of one row of x as they entered the product, zero-padded to whole vectors.
inline void input_row(const WeightGradArgs& a, int64_t m, int64_t k0, int64_t n, const WeightGradScratch& s,
                      float* to) {
  const char* p = row_pointer(a.x, m);
  const float mean = a.norm.present ? a.norm.mean[m] : 0.0f, rstd = a.norm.present ? a.norm.rstd[m] : 1.0f;
  for (int64_t k = 0; k < n; k += VL) {
    const int here = static_cast<int>(smaller(n - k, VL));
    Vec v = load_as(a.x.dtype, p, k0 + k, here);
    if (a.norm.present) v = (v - mean) * rstd * load(s.norm_weight + k) + load(s.norm_bias + k);
    if (a.gelu_in) v = gelu(v);
    store(to + k, v);
  }
}

inline void weight_grad_run(const WeightGradArgs& a, int64_t task, char* scratch) {
  const WeightGradScratch s(a, scratch);
  const int64_t in_chunks = ceil_div(a.in, a.in_chunk);
  const int64_t k0 = task % in_chunks * a.in_chunk, in = smaller(a.in - k0, a.in_chunk);
  const int64_t e0 = task / in_chunks * a.out_chunk, out = smaller(a.out_features - e0, a.out_chunk);
  const int64_t ld = s.ld;
  if (a.norm.present) {
    load_vector(a.norm.weight, k0, in, 1.0f, s.norm_weight);
    load_vector(a.norm.bias, k0, in, 0.0f, s.norm_bias);
  }
  const bool want_bias = a.grad_bias && k0 == 0, want_weight = a.grad_weight.data;
  for (int64_t i = 0; i < round_up(out, kBlock) * ld; i += VL) store(s.c + i, Vec{});
  for (int64_t e = 0; e < out; e++) s.bias[e] = 0;
  for (int64_t m = 0; m < a.rows; m += kRowBlock) {
    const int64_t count = smaller(a.rows - m, kRowBlock), lanes = round_up(count, VL);
    load_grad_panel(a.grad, a.pre, a.gelu_out, a.scale, m, count, e0, out, s.grad, s.pre, lanes);
    if (want_bias)
      for (int64_t e = 0; e < out; e++) {
        Vec total{};
        for (int64_t r = 0; r < lanes; r += VL) total += load(s.grad + e * lanes + r);
        s.bias[e] += sum(total);
      }
    if (!want_weight) continue;
    for (int64_t r = 0; r < count; r++) input_row(a, m + r, k0, in, s, s.x + r * ld);
    const Matrix grad{s.grad, DType::f32, lanes};
    for (int64_t e = 0; e < out; e += kBlock)
      for (int64_t k = 0; k < s.columns; k += kPanelVectors * VL) {
        const Panel x{s.x + k, ld, false};
        with_vectors(static_cast<int>(smaller((s.columns - k) / VL, kPanelVectors)), [&]<int NV>() {
          multiply_block<NV, true>(grad, e, out - e, count, x, s.c + e * ld + k, ld, nullptr);
        });
      }
  }
  if (want_weight)
    for (int64_t e = 0; e < out; e++) {
      const Rows& to = a.grad_weight;
      char* row = row_pointer(to, e0 + e);
      for (int64_t k = 0; k < in; k += VL)
        store_as(to.dtype, row, k0 + k, load(s.c + e * ld + k), static_cast<int>(smaller(in - k, VL)));
    }
  if (want_bias)
    for (int64_t e = 0; e < out; e++) {
      if (a.grad_bias_dtype == DType::f32)
        static_cast<float*>(a.grad_bias)[e0 + e] = s.bias[e];
      else
        static_cast<uint16_t*>(a.grad_bias)[e0 + e] = narrow(s.bias[e]);
    }
}

// --- transpose -------------------------------------------------------------------------------------------------------

inline int64_t transpose_tasks(TransposeArgs& a, int64_t) { return ceil_div(a.rows, VL); }
inline int64_t transpose_scratch(const TransposeArgs& a) { return round_up(a.columns * VL * 4, 64); }
inline void transpose_run(const TransposeArgs& a, int64_t task, char* scratch) {
  float* block = reinterpret_cast<float*>(scratch);
  const int64_t m = task * VL, count = smaller(a.rows - m, VL);
  load_transposed(a.from, m, count, 0, a.columns, block, VL);
  for (int64_t k = 0; k < a.columns; k++) store_n(a.to + k * a.rows + m, load(block + k * VL), static_cast<int>(count));
}

}  // namespace crossvit::CROSSVIT_ISA
