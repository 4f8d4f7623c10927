#pragma once

#include "token_pass.h"

namespace crossvit::CROSSVIT_ISA {

// --- gradient: one more pass over the tokens ---------------------------------------------------------------------------
//
//   t_h = dz_h . z_h,  ds_hn = p_hn (dz_h . xhat_n - t_h),  w_h = sum_n ds_hn xhat_n
//   dxhat_n = sum_h p_hn dz_h + ds_hn u_h, then back through the normalisation.
//
// By mathematics sum_n ds_hn = 0. What rounding in t_h leaves of it, e_h, is taken out again: w_h - e_h z_h.

struct CrossGradScratch {
  float *u, *both, *panel, *rows, *scores, *w, *t, *rest, *grad, *cls;
  int64_t width_padded, row_stride, heads_padded, bytes;
  CrossGradScratch(const CrossGradArgs& a, char* base) {
    Arena arena{base};
    const int64_t lanes = kPanelVectors * VL;
    width_padded = round_up(a.width, VL);
    row_stride = spread(width_padded);
    heads_padded = round_up(a.heads, kBlock);
    u = arena.floats(a.heads * a.width);
    both = arena.floats(a.width * 2 * a.heads);
    panel = arena.floats(width_padded * lanes);
    rows = arena.floats(lanes * row_stride);
    scores = arena.floats((a.heads + heads_padded) * lanes);
    w = arena.floats(heads_padded * width_padded);
    t = arena.floats(heads_padded);
    rest = arena.floats(heads_padded);
    grad = arena.floats(width_padded * lanes);
    cls = arena.floats(width_padded * VL);
    bytes = arena.used;
  }
};
inline int64_t cross_grad_tasks(CrossGradArgs& a, int64_t) { return a.batch; }
inline int64_t cross_grad_scratch(const CrossGradArgs& a) { return CrossGradScratch(a, nullptr).bytes; }

template <int NV>
inline void cross_grad_panel(const CrossGradArgs& a, const CrossGradScratch& s, const Rows& patches, int64_t image,
                             int64_t m, int64_t count) {
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
      const Vec x = from.load(r, k, static_cast<int>(smaller(a.width - k, VL)));
      store(s.rows + r * s.row_stride + k, (x - saved.mean[m + r]) * saved.rstd[m + r]);
    }

  // Rows of scores: p of every head, then ds of every head.
  float* ds = s.scores + a.heads * lanes;
  const float* grad_context = a.grad_context + image * a.heads * a.width;
  const Matrix dz{grad_context, DType::f32, a.width};
  for (int64_t h = 0; h < a.heads; h += kBlock)
    multiply_block<NV>(dz, h, a.heads - h, a.width, Panel{s.panel, lanes, false}, ds + h * lanes, lanes, nullptr,
                       kScoreChunk);
  for (int64_t h = 0; h < a.heads; h++)
    for (int v = 0; v < NV; v++) {
      const int n = static_cast<int>(smaller(larger(count - v * VL, 0), VL));
      const Vec p = n ? load_n(a.probs + (image * a.heads + h) * all + 1 + m + v * VL, n) : Vec{};
      store(s.scores + h * lanes + v * VL, p);
      const Vec gradient = p * (load(ds + h * lanes + v * VL) - s.t[h]);
      store(ds + h * lanes + v * VL, gradient);
      s.rest[h] += sum(gradient);
    }
  add_weighted_rows(ds, lanes, a.heads, s.rows, s.row_stride, count, a.width, s.w, s.width_padded);
  if (!a.grad_patches.data) return;

  const Matrix both{s.both, DType::f32, 2 * a.heads};
  for (int64_t k = 0; k < a.width; k += kBlock)
    multiply_block<NV>(both, k, a.width - k, 2 * a.heads, Panel{s.scores, lanes, false}, s.grad + k * lanes, lanes,
                       nullptr);
  Vec total[NV] = {}, along[NV] = {};
  for (int64_t k = 0; k < a.width; k++)
#pragma GCC unroll 16
    for (int v = 0; v < NV; v++) {
      const Vec g = load(s.grad + k * lanes + v * VL);
      total[v] += g;
      along[v] += g * load(s.panel + k * lanes + v * VL);
    }
  const float inverse = 1.0f / static_cast<float>(a.width);
  for (int64_t k = 0; k < a.width; k++)
#pragma GCC unroll 16
    for (int v = 0; v < NV; v++) {
      float* at = s.grad + k * lanes + v * VL;
      store(at, rstd[v] * (load(at) - total[v] * inverse - load(s.panel + k * lanes + v * VL) * (along[v] * inverse)));
    }
  const PanelRows out(tokens_of(a.grad_patches, image), m, count);
  for (int64_t k = 0; k < a.width; k += VL)
    for_each_row<NV>(s.grad + k * lanes, lanes, count,
                     [&](int64_t r, Vec g) { out.store(r, k, g, static_cast<int>(smaller(a.width - k, VL))); });
}

inline void cross_grad_run(const CrossGradArgs& a, int64_t task, char* scratch) {
  const CrossGradScratch s(a, scratch);
  const int64_t image = task, all = a.tokens + 1;
  const float* grad_context = a.grad_context + image * a.heads * a.width;
  load_u(a, image, s.u);
  for (int64_t k = 0; k < a.width; k++) {
    for (int64_t h = 0; h < a.heads; h++) {
      s.both[k * 2 * a.heads + h] = grad_context[h * a.width + k];
      s.both[k * 2 * a.heads + a.heads + h] = s.u[h * a.width + k];
    }
  }
  // The CLS token: its x-hat's gradient goes on to the query's, so it is handed back unfinished.
  const float mean = a.norm.mean[image * all], rstd = a.norm.rstd[image * all];
  const PanelRows cls(a.cls, image, 1);
  for (int64_t k = 0; k < a.width; k += VL) {
    const int n = static_cast<int>(smaller(a.width - k, VL));
    store(s.cls + k, (cls.load(0, k, n) - mean) * rstd);
  }
  float* grad_cls = a.grad_cls_normalized + image * a.width;
  for (int64_t k = 0; k < a.width; k++) grad_cls[k] = 0.0f;
  for (int64_t h = 0; h < a.heads; h++) {
    const float* dz = grad_context + h * a.width;
    s.t[h] = dot(dz, a.context + (image * a.heads + h) * a.width, a.width);
    const float p = a.probs[(image * a.heads + h) * all], ds = p * (dot(dz, s.cls, a.width) - s.t[h]);
    s.rest[h] = ds;
    for (int64_t k = 0; k < a.width; k++) {
      grad_cls[k] += p * dz[k] + ds * s.u[h * a.width + k];
      s.w[h * s.width_padded + k] = ds * s.cls[k];
    }
    for (int64_t k = a.width; k < s.width_padded; k++) s.w[h * s.width_padded + k] = 0.0f;
  }

  const Rows patches = tokens_of(a.patches, image);
  const PanelSplit split(a.tokens);
  for (int64_t p = 0; p < split.panels; p++) {
    const int64_t m = split.first(p), count = smaller(split.first(p + 1), a.tokens) - m;
    with_vectors(split.vectors_of(p), [&]<int NV>() { cross_grad_panel<NV>(a, s, patches, image, m, count); });
  }
  for (int64_t h = 0; h < a.heads; h++) {
    const float rest = s.rest[h], of_cls = rest * a.probs[(image * a.heads + h) * all];
    const float* z = a.context + (image * a.heads + h) * a.width;
    for (int64_t k = 0; k < a.width; k++) {
      a.grad_scores_tokens[(image * a.heads + h) * a.width + k] = s.w[h * s.width_padded + k] - rest * z[k];
      grad_cls[k] -= of_cls * s.u[h * a.width + k];
    }
  }
}

}  // namespace crossvit::CROSSVIT_ISA
