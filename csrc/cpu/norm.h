// LayerNorm on a panel, whose lanes are the rows: every reduction is a sum down the panel, none crosses lanes.
#pragma once

#include "rows.h"
#include "tasks.h"

namespace crossvit::CROSSVIT_ISA {

// mean and 1 / sqrt(variance + eps) of each lane, two passes over x - x[0]: constant rows give exactly zero, and a mean a
// hundred times the deviation cancels before it is squared.
template <int NV>
inline void panel_statistics(const float* x, int64_t depth, float eps, Vec* origin, Vec* shift, Vec* rstd) {
  constexpr int kChains = 4;  // independent sums hide the latency of the additions
  constexpr int64_t lanes = NV * VL;
  const float inverse = 1.0f / static_cast<float>(depth);
  Vec sum[kChains][NV] = {};
  for (int v = 0; v < NV; v++) origin[v] = load(x + v * VL);
  int64_t k = 0;
  for (; k + kChains <= depth; k += kChains)
#pragma GCC unroll 16
    for (int c = 0; c < kChains; c++)
#pragma GCC unroll 16
      for (int v = 0; v < NV; v++) sum[c][v] += load(x + (k + c) * lanes + v * VL) - origin[v];
  for (; k < depth; k++)
    for (int v = 0; v < NV; v++) sum[0][v] += load(x + k * lanes + v * VL) - origin[v];
  Vec square[kChains][NV] = {};
  for (int v = 0; v < NV; v++) shift[v] = ((sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v])) * inverse;
  for (k = 0; k + kChains <= depth; k += kChains)
#pragma GCC unroll 16
    for (int c = 0; c < kChains; c++)
#pragma GCC unroll 16
      for (int v = 0; v < NV; v++) {
        const Vec d = (load(x + (k + c) * lanes + v * VL) - origin[v]) - shift[v];
        square[c][v] += d * d;
      }
  for (; k < depth; k++)
    for (int v = 0; v < NV; v++) {
      const Vec d = (load(x + k * lanes + v * VL) - origin[v]) - shift[v];
      square[0][v] += d * d;
    }
  for (int v = 0; v < NV; v++) {
    const Vec variance = ((square[0][v] + square[1][v]) + (square[2][v] + square[3][v])) * inverse;
    rstd[v] = 1.0f / square_root(variance + eps);
  }
}

// x := act((x - mean) rstd weight + bias), in place; mean and rstd of rows [m, m + count) are written where wanted.
template <int NV>
inline void normalize_panel(float* x, int64_t depth, const Norm& norm, const float* weight, const float* bias,
                            int64_t m, int64_t count) {
  constexpr int64_t lanes = NV * VL;
  Vec origin[NV], shift[NV], rstd[NV];
  panel_statistics<NV>(x, depth, norm.eps, origin, shift, rstd);
  for (int64_t k = 0; k < depth; k++)
#pragma GCC unroll 16
    for (int v = 0; v < NV; v++) {
      float* at = x + k * lanes + v * VL;
      store(at, ((load(at) - origin[v]) - shift[v]) * rstd[v] * weight[k] + bias[k]);
    }
  if (norm.mean) {
    for (int v = 0; v < NV; v++) {
      const int n = lanes_in(larger(count - v * VL, 0));
      if (n == 0) break;
      store_n(norm.mean + m + v * VL, origin[v] + shift[v], n);
      store_n(norm.rstd + m + v * VL, rstd[v], n);
    }
  }
}

// The saved statistics of a panel's lanes; lanes past count get 0 and 0, so that their x-hat is 0.
template <int NV>
inline void load_statistics(const Norm& norm, int64_t m, int64_t count, Vec* mean, Vec* rstd) {
  for (int v = 0; v < NV; v++) {
    const int n = lanes_in(larger(count - v * VL, 0));
    mean[v] = n ? load_n(norm.mean + m + v * VL, n) : Vec{};
    rstd[v] = n ? load_n(norm.rstd + m + v * VL, n) : Vec{};
  }
}

inline void gelu_panel(float* x, int64_t values) {
  for (int64_t i = 0; i < values; i += VL) store(x + i, gelu(load(x + i)));
}

// The gradient through LayerNorm. x holds the rows, grad the gradient of the normalised rows; on return grad holds the
// gradient of the rows. The parameters' gradients of these rows are written to grad_weight and grad_bias where wanted.
// The mean of the gradient is subtracted last: where a row is one element wide, what it is subtracted from has been rounded
// as it was, and the difference is zero.
template <int NV>
inline void normalize_panel_backward(const float* x, float* grad, int64_t depth, const Norm& norm, const float* weight,
                                     int64_t m, int64_t count, float* grad_weight, float* grad_bias) {
  constexpr int64_t lanes = NV * VL;
  Vec mean[NV], rstd[NV], sum[NV] = {}, dot[NV] = {};
  load_statistics<NV>(norm, m, count, mean, rstd);
  for (int64_t k = 0; k < depth; k++) {
    Vec weight_sum{}, bias_sum{};
#pragma GCC unroll 16
    for (int v = 0; v < NV; v++) {
      const Vec normalized = (load(x + k * lanes + v * VL) - mean[v]) * rstd[v];
      const Vec g = load(grad + k * lanes + v * VL);
      weight_sum += g * normalized;
      bias_sum += g;
      sum[v] += g * weight[k];
      dot[v] += g * weight[k] * normalized;
    }
    if (grad_weight) grad_weight[k] = CROSSVIT_ISA::sum(weight_sum);
    if (grad_bias) grad_bias[k] = CROSSVIT_ISA::sum(bias_sum);
  }
  const float inverse = 1.0f / static_cast<float>(depth);
  for (int64_t k = 0; k < depth; k++)
#pragma GCC unroll 16
    for (int v = 0; v < NV; v++) {
      const Vec normalized = (load(x + k * lanes + v * VL) - mean[v]) * rstd[v];
      float* at = grad + k * lanes + v * VL;
      store(at, rstd[v] * ((load(at) * weight[k] - normalized * (dot[v] * inverse)) - sum[v] * inverse));
    }
}

}  // namespace crossvit::CROSSVIT_ISA
