// The token_pass step of cls_cross_attention: single-query attention in the absorbed form, in which keys and values are never
// made. The names are those of docs/design/cls_cross_attention.md.
//
//   u_h = gamma . a_h                                      u, from key_query
//   s_hn = u_h . xhat_n                                    scores
//   p_h = softmax_n(s_h)                                   probs
//   z_h = sum_n p_hn xhat_n                                context
//
// The tokens are read once: a panel of them is normalized, scored against all heads and added to all contexts while it is in
// cache, under a running softmax.
#pragma once

#include "attention.h"
#include "norm.h"

namespace crossvit::CROSSVIT_ISA {

// The tokens of one image.
inline Rows tokens_of(const Rows& rows, int64_t image) {
  return {static_cast<char*>(rows.data) + image * rows.batch_stride * size_of(rows.dtype), rows.dtype, rows.per_batch,
          0, rows.row_stride};
}

// u_h = gamma . a_h of one image's heads.
template <class Args>
inline void load_u(const Args& a, int64_t image, float* u) {
  const float* key_query = a.key_query + image * a.heads * a.width;
  for (int64_t k = 0; k < a.width; k++) {
    const float gamma = element(a.norm.weight, k);
    for (int64_t h = 0; h < a.heads; h++) u[h * a.width + k] = gamma * key_query[h * a.width + k];
  }
}

// Row m of rows, normalised without the affine part, zero-padded; returns its mean and rstd.
inline void normalize_row(const Rows& rows, int64_t m, int64_t width, float eps, float* to, float* mean, float* rstd) {
  load_transposed(rows, m, 1, 0, width, to, VL);  // lane 0 is the row: the very arithmetic of the panels
  Vec origin[1], shift[1], rstd_of[1];
  panel_statistics<1>(to, width, eps, origin, shift, rstd_of);
  *mean = origin[0][0] + shift[0][0];
  *rstd = rstd_of[0][0];
  for (int64_t k = 0; k < width; k++) to[k] = ((to[k * VL] - origin[0][0]) - shift[0][0]) * rstd_of[0][0];
  for (int64_t k = width; k < round_up(width, VL); k++) to[k] = 0.0f;
}

struct TokenPassScratch : Scratch<TokenPassArgs, SplitPlan> {
  static constexpr int64_t lanes = kPanelVectors * VL;
  int64_t width_padded = round_up(a.width, VL);
  int64_t row_stride = spread(width_padded);
  int64_t heads_padded = round_up(a.heads, kBlock);
  float* u = floats(a.heads * a.width);
  float* panel = floats(width_padded * lanes);
  float* rows = floats(lanes * row_stride);
  float* scores = floats(heads_padded * lanes);
  float* context = floats(heads_padded * width_padded);
  float *highest = floats(heads_padded), *sum = floats(heads_padded);
  float* cls = floats(width_padded * VL);
};

CROSSVIT_INLINE float dot(const float* a, const float* b, int64_t n) {
  Vec total{};
  int64_t i = 0;
  for (; i + VL <= n; i += VL) total += load(a + i) * load(b + i);
  if (i < n) total += load_n(a + i, static_cast<int>(n - i)) * load_n(b + i, static_cast<int>(n - i));
  return sum(total);
}
CROSSVIT_INLINE float highest_of(Vec v) {
  float m = v[0];
  for (int i = 1; i < VL; i++) m = v[i] > m ? v[i] : m;
  return m;
}
CROSSVIT_INLINE float exponential_of(float x) { return exponential(broadcast(x))[0]; }

// Patches [m, m + count) of one image: x-hat down a panel and, row-major, in s.rows. Statistics are written where wanted.
template <int NV>
inline void normalize_tokens(const Rows& patches, int64_t m, int64_t count, int64_t width, float eps, float* mean,
                             float* rstd, float* panel, float* rows, int64_t ldr) {
  constexpr int64_t lanes = NV * VL;
  load_transposed(patches, m, count, 0, width, panel, lanes);
  Vec origin[NV], shift[NV], rstd_of[NV];
  panel_statistics<NV>(panel, width, eps, origin, shift, rstd_of);
  for (int64_t k = 0; k < width; k++)
#pragma GCC unroll 16
    for (int v = 0; v < NV; v++) {
      float* at = panel + k * lanes + v * VL;
      store(at, ((load(at) - origin[v]) - shift[v]) * rstd_of[v]);
    }
  const PanelRows from(patches, m, count);
  for (int64_t r = 0; r < count; r++) {
    const float x0 = origin[r / VL][r % VL], offset = shift[r / VL][r % VL], scale = rstd_of[r / VL][r % VL];
    for (int64_t k = 0; k < width; k += VL) {
      const int n = lanes_in(width - k);
      const Vec x = from.load(r, k, n);
      store(rows + r * ldr + k, ((x - x0) - offset) * scale);
    }
  }
  if (!mean) return;
  for (int v = 0; v < NV && v * VL < count; v++) {
    const int n = lanes_in(count - v * VL);
    store_n(mean + m + v * VL, origin[v] + shift[v], n);
    store_n(rstd + m + v * VL, rstd_of[v], n);
  }
}

// context[h][k] += sum over r of weights[h][r] rows[r][k]
inline void add_weighted_rows(const float* weights, int64_t ldw, int64_t heads, const float* rows, int64_t ldr,
                              int64_t count, int64_t width, float* context, int64_t ldc) {
  const Matrix matrix{weights, DType::float32, ldw};
  const PanelSplit columns(width);
  for (int64_t c = 0; c < columns.panels; c++)
    with_vectors(columns.vectors_of(c), [&]<int NJ>() {
      const int64_t k = columns.first(c);
      for (int64_t h = 0; h < heads; h += kBlock)
        multiply_block<NJ, true>(matrix, h, heads - h, count, Panel{const_cast<float*>(rows) + k, ldr, false},
                                 context + h * ldc + k, ldc, nullptr);
    });
}

// One panel of tokens under the running softmax. score_to: where the scores of head h, token m go (h * stride + m), or null.
template <int NV>
inline void attend_panel(const TokenPassArgs& a, const TokenPassScratch& s, int64_t count, float* score_to,
                         int64_t stride) {
  constexpr int64_t lanes = NV * VL;
  const Matrix u{s.u, DType::float32, a.width};
  const Panel panel{s.panel, lanes, false};
  for (int64_t h = 0; h < a.heads; h += kBlock)
    multiply_block<NV>(u, h, a.heads - h, a.width, panel, s.scores + h * lanes, lanes, nullptr, kScoreChunk);
  for (int64_t h = 0; h < a.heads; h++) {
    float* scores = s.scores + h * lanes;
    // Lanes past the last token must neither raise the maximum nor add to the sum.
    for (int64_t r = count; r < lanes; r++) scores[r] = -__builtin_inff();
    Vec most = load(scores);
    for (int v = 1; v < NV; v++) most = maximum(load(scores + v * VL), most);
    const float before = s.highest[h], panel_highest = highest_of(most);
    const float now = panel_highest > before ? panel_highest : before;
    if (score_to)
      for (int v = 0; v < NV && v * VL < count; v++)
        store_n(score_to + h * stride + v * VL, load(scores + v * VL), lanes_in(count - v * VL));
    Vec total{};
    for (int v = 0; v < NV; v++) {
      const Vec p = exponential(load(scores + v * VL) - now);
      total += p;
      store(scores + v * VL, p);
    }
    if (now > before) {
      const float shrink = exponential_of(before - now);
      s.sum[h] *= shrink;
      for (int64_t k = 0; k < s.width_padded; k += VL)
        store(s.context + h * s.width_padded + k, load(s.context + h * s.width_padded + k) * shrink);
      s.highest[h] = now;
    }
    s.sum[h] += sum(total);
  }
  add_weighted_rows(s.scores, lanes, a.heads, s.rows, s.row_stride, count, a.width, s.context, s.width_padded);
}

inline SplitPlan token_pass_plan(const TokenPassArgs& a, int64_t threads) {
  const int64_t panels = PanelSplit(a.tokens).panels;
  SplitPlan plan;
  plan.splits = a.batch >= 2 * threads || a.batch == 0 ? 1 : larger(1, smaller(ceil_div(2 * threads, a.batch), panels));
  plan.tasks = a.batch * plan.splits;
  return plan;
}
// probs := exp(score - highest) / sum, in place.
inline void finish_probabilities(float* probs, int64_t tokens, float highest, float total) {
  const float inverse = 1.0f / total;
  for (int64_t n = 0; n < tokens; n += VL) {
    const int here = lanes_in(tokens - n);
    store_n(probs + n, exponential(load_n(probs + n, here) - highest) * inverse, here);
  }
}

inline void token_pass_run(const TokenPassArgs& a, const SplitPlan& plan, int64_t task, const TokenPassScratch& s) {
  const int64_t image = task / plan.splits, piece = task % plan.splits, all = a.tokens + 1;
  load_u(a, image, s.u);
  float* probs = a.probs ? a.probs + image * a.heads * all : nullptr;
  float *mean = a.norm.mean ? a.norm.mean + image * all : nullptr, *rstd = mean ? a.norm.rstd + image * all : nullptr;

  if (piece == 0) {  // the CLS token starts the running softmax
    float cls_mean, cls_rstd;
    normalize_row(a.cls, image, a.width, a.norm.eps, s.cls, &cls_mean, &cls_rstd);
    if (mean) *mean = cls_mean, *rstd = cls_rstd;
    for (int64_t h = 0; h < a.heads; h++) {
      s.highest[h] = dot(s.u + h * a.width, s.cls, a.width);
      // A score that is not finite must show in the result, as it does in a softmax.
      s.sum[h] = exponential_of(s.highest[h] - s.highest[h]);
      if (probs) probs[h * all] = s.highest[h];
      for (int64_t k = 0; k < s.width_padded; k += VL) store(s.context + h * s.width_padded + k, load(s.cls + k));
    }
  } else {
    for (int64_t h = 0; h < a.heads; h++) {
      s.highest[h] = -__builtin_inff();
      s.sum[h] = 0.0f;
      for (int64_t k = 0; k < s.width_padded; k += VL) store(s.context + h * s.width_padded + k, Vec{});
    }
  }

  const Rows patches = tokens_of(a.patches, image);
  const PanelSplit split(a.tokens);
  for (int64_t p = piece * split.panels / plan.splits; p < (piece + 1) * split.panels / plan.splits; p++) {
    const int64_t m = split.first(p), count = smaller(split.first(p + 1), a.tokens) - m;
    with_vectors(split.vectors_of(p), [&]<int NV>() {
      normalize_tokens<NV>(patches, m, count, a.width, a.norm.eps, mean ? mean + 1 : nullptr, mean ? rstd + 1 : nullptr,
                           s.panel, s.rows, s.row_stride);
      attend_panel<NV>(a, s, count, probs ? probs + 1 + m : nullptr, all);
    });
  }

  for (int64_t h = 0; h < a.heads; h++) {
    const float* from = s.context + h * s.width_padded;
    float* to;
    float factor = 1.0f;
    if (plan.splits == 1) {
      to = a.context + (image * a.heads + h) * a.width;
      factor = 1.0f / s.sum[h];
      if (probs) finish_probabilities(probs + h * all, all, s.highest[h], s.sum[h]);
    } else {
      to = a.partial + (task * a.heads + h) * (a.width + 2);
      to[a.width] = s.highest[h];
      to[a.width + 1] = s.sum[h];
    }
    for (int64_t k = 0; k < a.width; k += VL) store_n(to + k, load(from + k) * factor, lanes_in(a.width - k));
  }
}

// Joins the pieces of an image whose tokens were split over tasks, in the order of the tokens.
struct JoinSplitsScratch : Scratch<JoinSplitsArgs> {};
inline Plan join_splits_plan(const JoinSplitsArgs& a, int64_t) { return {a.batch * a.heads}; }
inline void join_splits_run(const JoinSplitsArgs& a, const Plan&, int64_t task, const JoinSplitsScratch&) {
  const int64_t image = task / a.heads, head = task % a.heads, stride = a.heads * (a.width + 2);
  const float* piece = a.partial + (image * a.splits * a.heads + head) * (a.width + 2);
  float highest = piece[a.width], total = 0.0f;
  for (int64_t i = 1; i < a.splits; i++)
    highest = piece[i * stride + a.width] > highest ? piece[i * stride + a.width] : highest;
  float* context = a.context + task * a.width;
  for (int64_t i = 0; i < a.splits; i++)
    total += piece[i * stride + a.width + 1] * exponential_of(piece[i * stride + a.width] - highest);
  for (int64_t k = 0; k < a.width; k++) context[k] = 0.0f;
  for (int64_t i = 0; i < a.splits; i++) {
    const float factor = exponential_of(piece[i * stride + a.width] - highest) / total;
    for (int64_t k = 0; k < a.width; k++) context[k] += piece[i * stride + k] * factor;
  }
  if (a.probs) finish_probabilities(a.probs + task * (a.tokens + 1), a.tokens + 1, highest, total);
}

}  // namespace crossvit::CROSSVIT_ISA
