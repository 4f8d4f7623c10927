// Backward of attention.h, one head of one image a task: probabilities are made again from the saved log sum exp.
#pragma once

#include "attention.h"

namespace crossvit::CROSSVIT_ISA {

struct AttentionGradScratch {
  float *query, *grad, *scores, *grad_scores, *keys_t, *query_rows, *grad_rows, *grad_keys, *grad_values, *c, *widened;
  int64_t keys_padded, width_padded, bytes;
  AttentionGradScratch(const AttentionGradArgs& a, char* base) {
    Arena arena{base};
    const int64_t lanes = kPanelVectors * VL;
    keys_padded = round_up(a.tokens, VL);
    width_padded = round_up(a.width, VL);
    query = arena.floats(width_padded * lanes);
    grad = arena.floats(width_padded * lanes);
    scores = arena.floats(keys_padded * lanes);
    grad_scores = arena.floats(keys_padded * lanes);
    keys_t = arena.floats(width_padded * keys_padded);
    query_rows = arena.floats(lanes * width_padded);
    grad_rows = arena.floats(lanes * width_padded);
    grad_keys = arena.floats(keys_padded * width_padded);
    grad_values = arena.floats(keys_padded * width_padded);
    c = arena.floats(width_padded * lanes);
    widened = arena.floats(kBlock * a.width);
    bytes = arena.used;
  }
};

template <int NV>
inline void attention_grad_panel(const AttentionGradArgs& a, int64_t image, int64_t head, int64_t m, int64_t count,
                                 const AttentionGradScratch& s) {
  constexpr int64_t lanes = NV * VL;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(a.width));
  const Rows query = head_rows(a, image, head, 0), grad = joined_rows(a, a.grad_out, image, head);
  const Matrix keys = as_matrix(head_rows(a, image, head, 1)), values = as_matrix(head_rows(a, image, head, 2));
  load_transposed(query, m, count, 0, a.width, s.query, lanes);
  load_rows(query, m, count, a.width, s.query_rows, s.width_padded);
  load_rows(grad, m, count, a.width, s.grad_rows, s.width_padded);

  // delta[q] = out[q] . grad[q], which is sum over keys of p times its gradient.
  load_transposed(joined_rows(a, a.out, image, head), m, count, 0, a.width, s.grad, lanes);
  Vec delta[NV] = {}, lse[NV];
  load_transposed(grad, m, count, 0, a.width, s.c, lanes);
  for (int64_t j = 0; j < a.width; j++)
    for (int v = 0; v < NV; v++) delta[v] += load(s.grad + j * lanes + v * VL) * load(s.c + j * lanes + v * VL);
  const float* saved = a.lse + (image * a.heads + head) * a.tokens + m;
  for (int v = 0; v < NV; v++) {
    const int n = static_cast<int>(smaller(larger(count - v * VL, 0), VL));
    lse[v] = n ? load_n(saved + v * VL, n) : Vec{};
  }

  const Panel queries{s.query, lanes, false}, grads{s.c, lanes, false};
  for (int64_t n = 0; n < a.tokens; n += kBlock) {
    float *p = s.scores + n * lanes, *ds = s.grad_scores + n * lanes;
    multiply_block<NV>(keys, n, a.tokens - n, a.width, queries, p, lanes, s.widened);
    multiply_block<NV>(values, n, a.tokens - n, a.width, grads, ds, lanes, s.widened);
    for (int e = 0; e < kBlock; e++) CROSSVIT_UNROLL
      for (int v = 0; v < NV; v++) {
        const int64_t at = e * lanes + v * VL;
        const Vec probability = exponential(load(p + at) * scale - lse[v]);
        store(p + at, probability);
        store(ds + at, probability * (load(ds + at) - delta[v]) * scale);
      }
  }

  const Panel grad_scores{s.grad_scores, lanes, false};
  const Matrix keys_t{s.keys_t, DType::f32, s.keys_padded};
  Rows grad_query = head_rows(a, image, head, 0);
  grad_query.data = static_cast<char*>(a.grad_qkv) +
                    (image * a.tokens * 3 * a.heads + head) * a.width * size_of(a.dtype);
  grad_query.row_stride = 3 * a.heads * a.width;
  const PanelRows to(grad_query, m, count);
  for (int64_t j = 0; j < a.width; j += kBlock)
    multiply_block<NV>(keys_t, j, a.width - j, a.tokens, grad_scores, s.c + j * lanes, lanes, nullptr);
  for (int64_t j = 0; j < a.width; j += VL)
    for_each_row<NV>(s.c + j * lanes, lanes, count,
                     [&](int64_t r, Vec g) { to.store(r, j, g, static_cast<int>(smaller(a.width - j, VL))); });

  const Matrix p{s.scores, DType::f32, lanes}, ds{s.grad_scores, DType::f32, lanes};
  const PanelSplit columns(a.width);
  for (int64_t c = 0; c < columns.panels; c++)
    with_vectors(columns.vectors_of(c), [&]<int NJ>() {
      const int64_t j = columns.first(c);
      const Panel query_rows{s.query_rows + j, s.width_padded, false}, grad_rows{s.grad_rows + j, s.width_padded, false};
      for (int64_t n = 0; n < a.tokens; n += kBlock) {
        const int64_t at = n * s.width_padded + j;
        multiply_block<NJ, true>(ds, n, a.tokens - n, count, query_rows, s.grad_keys + at, s.width_padded, nullptr);
        multiply_block<NJ, true>(p, n, a.tokens - n, count, grad_rows, s.grad_values + at, s.width_padded, nullptr);
      }
    });
}

inline int64_t attention_grad_tasks(AttentionGradArgs& a, int64_t) { return a.batch * a.heads; }
inline int64_t attention_grad_scratch(const AttentionGradArgs& a) { return AttentionGradScratch(a, nullptr).bytes; }

inline void attention_grad_run(const AttentionGradArgs& a, int64_t task, char* scratch) {
  const AttentionGradScratch s(a, scratch);
  const int64_t image = task / a.heads, head = task % a.heads;
  load_transposed(head_rows(a, image, head, 1), 0, a.tokens, 0, a.width, s.keys_t, s.keys_padded);
  for (int64_t i = 0; i < s.keys_padded * s.width_padded; i += VL) {
    store(s.grad_keys + i, Vec{});
    store(s.grad_values + i, Vec{});
  }
  const PanelSplit split(a.tokens);
  for (int64_t p = 0; p < split.panels; p++) {
    const int64_t m = split.first(p), count = smaller(split.first(p + 1), a.tokens) - m;
    with_vectors(split.vectors_of(p), [&]<int NV>() { attention_grad_panel<NV>(a, image, head, m, count, s); });
  }
  const int64_t stride = 3 * a.heads * a.width;
  for (int64_t which = 1; which <= 2; which++) {
    const float* from = which == 1 ? s.grad_keys : s.grad_values;
    const int64_t offset = image * a.tokens * stride + (which * a.heads + head) * a.width;
    const Rows to{static_cast<char*>(a.grad_qkv) + offset * size_of(a.dtype), a.dtype, a.tokens, 0, stride};
    for (int64_t n0 = 0; n0 < a.tokens; n0 += kPanelVectors * VL) {
      const int64_t count = smaller(a.tokens - n0, kPanelVectors * VL);
      const PanelRows rows(to, n0, count);
      for (int64_t r = 0; r < count; r++)
        for (int64_t j = 0; j < a.width; j += VL)
          rows.store(r, j, load(from + (n0 + r) * s.width_padded + j), static_cast<int>(smaller(a.width - j, VL)));
    }
  }
}

}  // namespace crossvit::CROSSVIT_ISA
