// Single-query cross-attention in the absorbed form: keys and values are never made. Names are those of the formula:
//
//   q_h = W_q,h (gamma . xhat_0 + beta) + b_q,h        query
//   a_h = W_k,h^T q_h / sqrt(d)                        key_query;  u_h = gamma . a_h
//   p_h = softmax_n(u_h . xhat_n)                      probs
//   z_h = sum_n p_hn xhat_n                            context
//   out_h = W_v,h (gamma . z_h + beta) + b_v,h
//
// The tokens are read once: a panel of them is normalised, scored against all heads and added to all contexts while it
// is in cache, under a running softmax.
#pragma once

#include "attention.h"
#include "norm.h"

namespace crossvit::CROSSVIT_ISA {

// --- absorb: result[b][h] = scale * W_h^T rows[b][h], W_h the d rows of a (heads d, width) matrix ------------------------

constexpr int64_t kAbsorbColumns = kPanelVectors * VL;

inline int64_t absorb_tasks(AbsorbArgs& a, int64_t) {
  return a.batch ? a.heads * ceil_div(a.width, kAbsorbColumns) : 0;
}
struct AbsorbScratch {
  float *matrix, *c;
  int64_t bytes;
  AbsorbScratch(const AbsorbArgs& a, char* base) {
    Arena arena{base};
    matrix = arena.floats(a.head_width * kAbsorbColumns);
    c = arena.floats(kBlock * kAbsorbColumns);
    bytes = arena.used;
  }
};
inline int64_t absorb_scratch(const AbsorbArgs& a) { return AbsorbScratch(a, nullptr).bytes; }

inline void absorb_run(const AbsorbArgs& a, int64_t task, char* scratch) {
  const AbsorbScratch s(a, scratch);
  const int64_t pieces = ceil_div(a.width, kAbsorbColumns);
  const int64_t head = task / pieces, j0 = task % pieces * kAbsorbColumns;
  const int64_t columns = smaller(a.width - j0, kAbsorbColumns);
  const Rows matrix{const_cast<void*>(a.weight.data), a.weight.dtype, a.heads * a.head_width, 0, a.weight.row_stride};
  // Here the matrix is the panel, its columns the lanes.
  for (int64_t i = 0; i < a.head_width; i += kPanelVectors * VL) {
    const int64_t count = smaller(a.head_width - i, kPanelVectors * VL);
    Rows piece = matrix;
    piece.data = static_cast<char*>(piece.data) + j0 * size_of(matrix.dtype);
    load_rows(piece, head * a.head_width + i, count, columns, s.matrix + i * kAbsorbColumns, kAbsorbColumns);
  }
  const Matrix rows{a.rows + head * a.head_width, DType::f32, a.heads * a.head_width};
  const Panel panel{s.matrix, kAbsorbColumns, false};
  for (int64_t b = 0; b < a.batch; b += kBlock) {
    const int64_t count = smaller(a.batch - b, kBlock);
    with_vectors(static_cast<int>(ceil_div(columns, VL)), [&]<int NV>() {
      multiply_block<NV>(rows, b, count, a.head_width, panel, s.c, kAbsorbColumns, nullptr, kScoreChunk);
    });
    for (int64_t e = 0; e < count; e++)
      for (int64_t j = 0; j < columns; j += VL)
        store_n(a.result + ((b + e) * a.heads + head) * a.width + j0 + j, load(s.c + e * kAbsorbColumns + j) * a.scale,
                static_cast<int>(smaller(columns - j, VL)));
  }
}

// --- project_heads: out[b][h d + e] = scale * (W_h (gamma . rows[b][h] + beta) + bias) ----------------------------------

struct ProjectHeadsScratch {
  float *panel, *c, *widened, *weight, *shift, *bias;
  int64_t bytes;
  ProjectHeadsScratch(const ProjectHeadsArgs& a, char* base) {
    Arena arena{base};
    panel = arena.floats(a.width * kPanelVectors * VL);
    c = arena.floats(VL * kPanelVectors * VL);
    widened = arena.floats(kBlock * a.width);
    weight = arena.floats(a.width + VL);
    shift = arena.floats(a.width + VL);
    bias = arena.floats(a.head_width + VL);
    bytes = arena.used;
  }
};
inline int64_t project_heads_tasks(ProjectHeadsArgs& a, int64_t) { return a.heads * PanelSplit(a.batch).panels; }
inline int64_t project_heads_scratch(const ProjectHeadsArgs& a) { return ProjectHeadsScratch(a, nullptr).bytes; }

inline void project_heads_run(const ProjectHeadsArgs& a, int64_t task, char* scratch) {
  const ProjectHeadsScratch s(a, scratch);
  const PanelSplit split(a.batch);
  const int64_t head = task % a.heads, panel_index = task / a.heads;
  const int64_t m = split.first(panel_index), count = smaller(split.first(panel_index + 1), a.batch) - m;
  load_vector(a.gamma, 0, a.width, 1.0f, s.weight);
  load_vector(a.beta, 0, a.width, 0.0f, s.shift);
  load_vector(a.bias, head * a.head_width, a.head_width, 0.0f, s.bias);
  with_vectors(split.vectors_of(panel_index), [&]<int NV>() {
    constexpr int64_t lanes = NV * VL;
    const Rows rows{const_cast<float*>(a.rows) + head * a.width, DType::f32, a.batch, 0, a.heads * a.width};
    load_transposed(rows, m, count, 0, a.width, s.panel, lanes);
    for (int64_t k = 0; k < a.width; k++)
      for (int64_t r = 0; r < lanes; r += VL)
        store(s.panel + k * lanes + r, load(s.panel + k * lanes + r) * s.weight[k] + s.shift[k]);
    const Panel panel{s.panel, lanes, false};
    const PanelRows out(a.out, m, count);
    for (int64_t e = 0; e < a.head_width; e += VL) {
      const int n = static_cast<int>(smaller(a.head_width - e, VL));
      for (int64_t i = 0; i < n; i += kBlock)
        multiply_block<NV>(a.weight, head * a.head_width + e + i, n - i, a.width, panel, s.c + i * lanes, lanes,
                           s.widened, kScoreChunk);
      const Vec bias = load(s.bias + e);
      for_each_row<NV>(s.c, lanes, count,
                       [&](int64_t r, Vec y) { out.store(r, head * a.head_width + e, (y + bias) * a.scale, n); });
    }
  });
}

// --- the pass over the tokens ------------------------------------------------------------------------------------------

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
  Vec first[1], rest[1], factor[1];
  panel_statistics<1>(to, width, eps, first, rest, factor);
  *mean = first[0][0] + rest[0][0];
  *rstd = factor[0][0];
  for (int64_t k = 0; k < width; k++) to[k] = ((to[k * VL] - first[0][0]) - rest[0][0]) * factor[0][0];
  for (int64_t k = width; k < round_up(width, VL); k++) to[k] = 0.0f;
}

struct CrossScratch {
  float *u, *panel, *rows, *scores, *context, *highest, *sum, *cls;
  int64_t width_padded, row_stride, heads_padded, bytes;
  CrossScratch(const CrossArgs& a, char* base) {
    Arena arena{base};
    const int64_t lanes = kPanelVectors * VL;
    width_padded = round_up(a.width, VL);
    row_stride = spread(width_padded);
    heads_padded = round_up(a.heads, kBlock);
    u = arena.floats(a.heads * a.width);
    panel = arena.floats(width_padded * lanes);
    rows = arena.floats(lanes * row_stride);
    scores = arena.floats(heads_padded * lanes);
    context = arena.floats(heads_padded * width_padded);
    highest = arena.floats(heads_padded);
    sum = arena.floats(heads_padded);
    cls = arena.floats(width_padded * VL);
    bytes = arena.used;
  }
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
  Vec first[NV], rest[NV], factor[NV];
  panel_statistics<NV>(panel, width, eps, first, rest, factor);
  for (int64_t k = 0; k < width; k++) CROSSVIT_UNROLL
    for (int v = 0; v < NV; v++) {
      float* at = panel + k * lanes + v * VL;
      store(at, ((load(at) - first[v]) - rest[v]) * factor[v]);
    }
  const PanelRows from(patches, m, count);
  for (int64_t r = 0; r < count; r++) {
    const float x0 = first[r / VL][r % VL], shift = rest[r / VL][r % VL], scale = factor[r / VL][r % VL];
    for (int64_t k = 0; k < width; k += VL) {
      const int n = static_cast<int>(smaller(width - k, VL));
      const Vec x = from.load(r, k, n);
      store(rows + r * ldr + k, ((x - x0) - shift) * scale);
    }
  }
  if (!mean) return;
  for (int v = 0; v < NV && v * VL < count; v++) {
    const int n = static_cast<int>(smaller(count - v * VL, VL));
    store_n(mean + m + v * VL, first[v] + rest[v], n);
    store_n(rstd + m + v * VL, factor[v], n);
  }
}

// context[h][k] += sum over r of weights[h][r] rows[r][k]
inline void add_weighted_rows(const float* weights, int64_t ldw, int64_t heads, const float* rows, int64_t ldr,
                              int64_t count, int64_t width, float* context, int64_t ldc) {
  const Matrix matrix{weights, DType::f32, ldw};
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
inline void attend_panel(const CrossArgs& a, const CrossScratch& s, int64_t count, float* score_to, int64_t stride) {
  constexpr int64_t lanes = NV * VL;
  const Matrix u{s.u, DType::f32, a.width};
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
        store_n(score_to + h * stride + v * VL, load(scores + v * VL), static_cast<int>(smaller(count - v * VL, VL)));
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

inline int64_t cross_tasks(CrossArgs& a, int64_t threads) {
  const int64_t panels = PanelSplit(a.tokens).panels;
  a.splits = a.batch >= 2 * threads || a.batch == 0 ? 1 : larger(1, smaller(ceil_div(2 * threads, a.batch), panels));
  return a.batch * a.splits;
}
inline int64_t cross_scratch(const CrossArgs& a) { return CrossScratch(a, nullptr).bytes; }

// probs := exp(score - highest) / sum, in place.
inline void finish_probabilities(float* probs, int64_t tokens, float highest, float total) {
  const float inverse = 1.0f / total;
  for (int64_t n = 0; n < tokens; n += VL) {
    const int here = static_cast<int>(smaller(tokens - n, VL));
    store_n(probs + n, exponential(load_n(probs + n, here) - highest) * inverse, here);
  }
}

inline void cross_run(const CrossArgs& a, int64_t task, char* scratch) {
  const CrossScratch s(a, scratch);
  const int64_t image = task / a.splits, piece = task % a.splits, all = a.tokens + 1;
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
  for (int64_t p = piece * split.panels / a.splits; p < (piece + 1) * split.panels / a.splits; p++) {
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
    if (a.splits == 1) {
      to = a.context + (image * a.heads + h) * a.width;
      factor = 1.0f / s.sum[h];
      if (probs) finish_probabilities(probs + h * all, all, s.highest[h], s.sum[h]);
    } else {
      to = a.partial + (task * a.heads + h) * (a.width + 2);
      to[a.width] = s.highest[h];
      to[a.width + 1] = s.sum[h];
    }
    for (int64_t k = 0; k < a.width; k += VL)
      store_n(to + k, load(from + k) * factor, static_cast<int>(smaller(a.width - k, VL)));
  }
}

// Joins the pieces of an image whose tokens were split over tasks, in the order of the tokens.
inline int64_t cross_combine_tasks(CrossArgs& a, int64_t) { return a.splits == 1 ? 0 : a.batch * a.heads; }
inline int64_t cross_combine_scratch(const CrossArgs&) { return 64; }
inline void cross_combine_run(const CrossArgs& a, int64_t task, char*) {
  const int64_t image = task / a.heads, head = task % a.heads, stride = a.heads * (a.width + 2);
  const float* piece = a.partial + (image * a.splits * a.heads + head) * (a.width + 2);
  float highest = piece[a.width], total = 0.0f;
  for (int64_t i = 1; i < a.splits; i++) highest = piece[i * stride + a.width] > highest ? piece[i * stride + a.width] : highest;
  float* context = a.context + task * a.width;
  for (int64_t i = 0; i < a.splits; i++) total += piece[i * stride + a.width + 1] * exponential_of(piece[i * stride + a.width] - highest);
  for (int64_t k = 0; k < a.width; k++) context[k] = 0.0f;
  for (int64_t i = 0; i < a.splits; i++) {
    const float factor = exponential_of(piece[i * stride + a.width] - highest) / total;
    for (int64_t k = 0; k < a.width; k++) context[k] += piece[i * stride + k] * factor;
  }
  if (a.probs) finish_probabilities(a.probs + task * (a.tokens + 1), a.tokens + 1, highest, total);
}

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
    CROSSVIT_UNROLL
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
    multiply_block<NV>(dz, h, a.heads - h, a.width, Panel{s.panel, lanes, false}, ds + h * lanes, lanes, nullptr, kScoreChunk);
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
    CROSSVIT_UNROLL
    for (int v = 0; v < NV; v++) {
      const Vec g = load(s.grad + k * lanes + v * VL);
      total[v] += g;
      along[v] += g * load(s.panel + k * lanes + v * VL);
    }
  const float inverse = 1.0f / static_cast<float>(a.width);
  for (int64_t k = 0; k < a.width; k++)
    CROSSVIT_UNROLL
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
