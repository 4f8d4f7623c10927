// The token_gradient step of cls_cross_attention's backward: the second pass over the tokens. The names are those of
// docs/design/cls_cross_attention.md.
//
//   delta_h = dz_h . z_h                                   delta
//   ds_hn = p_hn (dz_h . xhat_n - delta_h)                 grad_scores
//   r_h = sum_n ds_hn                                      rest
//   du_h = sum_n ds_hn xhat_n - r_h z_h                    grad_u
//   dxhat_n = sum_h p_hn dz_h + ds_hn u_h                  grad_normalized
//
// The gradient of a patch goes on through the normalisation to grad_patches; that of the CLS token is handed back as it is.
#pragma once

#include "token_pass.h"

namespace crossvit::CROSSVIT_ISA {

// In a panel's scratch, probs holds a row of p for every head and behind them a row of ds for every head; coefficients holds,
// for every column, the dz of all heads and behind them their u, which these rows meet in the gradient of the tokens.
struct TokenGradientScratch : Scratch<TokenGradientArgs> {
  static constexpr int64_t lanes = kPanelVectors * VL;
  int64_t width_padded = round_up(a.width, VL);
  int64_t row_stride = spread(width_padded);
  int64_t heads_padded = round_up(a.heads, kBlock);
  float* u = floats(a.heads * a.width);
  float* coefficients = floats(a.width * 2 * a.heads);
  float* panel = floats(width_padded * lanes);
  float* rows = floats(lanes * row_stride);
  float* probs = floats((a.heads + heads_padded) * lanes);
  float* grad_u = floats(heads_padded * width_padded);
  float *delta = floats(heads_padded), *rest = floats(heads_padded);
  float* grad_normalized = floats(width_padded * lanes);
  float* cls = floats(width_padded * VL);
};
inline Plan token_gradient_plan(const TokenGradientArgs& a, int64_t) { return {a.batch}; }
template <int NV>
inline void token_gradient_panel(const TokenGradientArgs& a, const TokenGradientScratch& s, const Rows& patches,
                                 int64_t image, int64_t m, int64_t count) {
  constexpr int64_t lanes = NV * VL;
  const int64_t all = a.tokens + 1;
  Norm saved = a.norm;
  saved.mean += image * all + 1;
  saved.rstd += image * all + 1;
  Vec mean[NV], rstd[NV];
  load_statistics<NV>(saved, m, count, mean, rstd);
  load_transposed(patches, m, count, 0, a.width, s.panel, lanes);
  for (int64_t k = 0; k < a.width; k++)
#pragma GCC unroll 16
    for (int v = 0; v < NV; v++) {
      float* at = s.panel + k * lanes + v * VL;
      store(at, (load(at) - mean[v]) * rstd[v]);
    }
  const PanelRows from(patches, m, count);
  for (int64_t r = 0; r < count; r++)
    for (int64_t k = 0; k < a.width; k += VL) {
      const Vec x = from.load(r, k, lanes_in(a.width - k));
      store(s.rows + r * s.row_stride + k, (x - saved.mean[m + r]) * saved.rstd[m + r]);
    }

  float* const ds = s.probs + a.heads * lanes;
  const float* grad_context = a.grad_context + image * a.heads * a.width;
  const Matrix dz{grad_context, DType::float32, a.width};
  for (int64_t h = 0; h < a.heads; h += kBlock)
    multiply_block<NV>(dz, h, a.heads - h, a.width, Panel{s.panel, lanes, false}, ds + h * lanes, lanes, nullptr,
                       kScoreChunk);
  for (int64_t h = 0; h < a.heads; h++)
    for (int v = 0; v < NV; v++) {
      const int n = lanes_in(larger(count - v * VL, 0));
      const Vec p = n ? load_n(a.probs + (image * a.heads + h) * all + 1 + m + v * VL, n) : Vec{};
      store(s.probs + h * lanes + v * VL, p);
      const Vec gradient = p * (load(ds + h * lanes + v * VL) - s.delta[h]);
      store(ds + h * lanes + v * VL, gradient);
      s.rest[h] += sum(gradient);
    }
  add_weighted_rows(ds, lanes, a.heads, s.rows, s.row_stride, count, a.width, s.grad_u, s.width_padded);
  if (!a.grad_patches.data) return;

  const Matrix coefficients{s.coefficients, DType::float32, 2 * a.heads};
  for (int64_t k = 0; k < a.width; k += kBlock)
    multiply_block<NV>(coefficients, k, a.width - k, 2 * a.heads, Panel{s.probs, lanes, false},
                       s.grad_normalized + k * lanes, lanes, nullptr);
  Vec total[NV] = {}, along[NV] = {};
  for (int64_t k = 0; k < a.width; k++)
#pragma GCC unroll 16
    for (int v = 0; v < NV; v++) {
      const Vec g = load(s.grad_normalized + k * lanes + v * VL);
      total[v] += g;
      along[v] += g * load(s.panel + k * lanes + v * VL);
    }
  const float inverse = 1.0f / static_cast<float>(a.width);
  for (int64_t k = 0; k < a.width; k++)
#pragma GCC unroll 16
    for (int v = 0; v < NV; v++) {
      float* at = s.grad_normalized + k * lanes + v * VL;
      store(at, rstd[v] * (load(at) - total[v] * inverse - load(s.panel + k * lanes + v * VL) * (along[v] * inverse)));
    }
  const PanelRows out(tokens_of(a.grad_patches, image), m, count);
  for (int64_t k = 0; k < a.width; k += VL)
    for_each_row<NV>(s.grad_normalized + k * lanes, lanes, count,
                     [&](int64_t r, Vec g) { out.store(r, k, g, lanes_in(a.width - k)); });
}

inline void token_gradient_run(const TokenGradientArgs& a, const Plan&, int64_t task, const TokenGradientScratch& s) {
  const int64_t image = task, all = a.tokens + 1;
  const float* grad_context = a.grad_context + image * a.heads * a.width;
  load_u(a, image, s.u);
  for (int64_t k = 0; k < a.width; k++) {
    for (int64_t h = 0; h < a.heads; h++) {
      s.coefficients[k * 2 * a.heads + h] = grad_context[h * a.width + k];
      s.coefficients[k * 2 * a.heads + a.heads + h] = s.u[h * a.width + k];
    }
  }
  // The query's gradient adds to that of the CLS token, so this one does not go through the normalisation yet.
  const float mean = a.norm.mean[image * all], rstd = a.norm.rstd[image * all];
  const PanelRows cls(a.cls, image, 1);
  for (int64_t k = 0; k < a.width; k += VL) {
    const int n = lanes_in(a.width - k);
    store(s.cls + k, (cls.load(0, k, n) - mean) * rstd);
  }
  float* grad_normalized_cls = a.grad_normalized + image * a.width;
  for (int64_t k = 0; k < a.width; k++) grad_normalized_cls[k] = 0.0f;
  for (int64_t h = 0; h < a.heads; h++) {
    const float* dz = grad_context + h * a.width;
    s.delta[h] = dot(dz, a.context + (image * a.heads + h) * a.width, a.width);
    const float p = a.probs[(image * a.heads + h) * all], ds = p * (dot(dz, s.cls, a.width) - s.delta[h]);
    s.rest[h] = ds;
    for (int64_t k = 0; k < a.width; k++) {
      grad_normalized_cls[k] += p * dz[k] + ds * s.u[h * a.width + k];
      s.grad_u[h * s.width_padded + k] = ds * s.cls[k];
    }
    for (int64_t k = a.width; k < s.width_padded; k++) s.grad_u[h * s.width_padded + k] = 0.0f;
  }

  const Rows patches = tokens_of(a.patches, image);
  const PanelSplit split(a.tokens);
  for (int64_t p = 0; p < split.panels; p++) {
    const int64_t m = split.first(p), count = smaller(split.first(p + 1), a.tokens) - m;
    with_vectors(split.vectors_of(p), [&]<int NV>() { token_gradient_panel<NV>(a, s, patches, image, m, count); });
  }
  for (int64_t h = 0; h < a.heads; h++) {
    const float rest = s.rest[h], rest_of_cls = rest * a.probs[(image * a.heads + h) * all];
    const float* z = a.context + (image * a.heads + h) * a.width;
    for (int64_t k = 0; k < a.width; k++) {
      a.grad_u[(image * a.heads + h) * a.width + k] = s.grad_u[h * s.width_padded + k] - rest * z[k];
      grad_normalized_cls[k] -= rest_of_cls * s.u[h * a.width + k];
    }
  }
}

}  // namespace crossvit::CROSSVIT_ISA
