// Backward of attention.h, one head of one image a task: probabilities are made again from the saved log sum exp. With S the
// scaled scores, P = softmax(S), dP = dO V^T and dS = P * (dP - sum(dO * O)): dQ = dS K, dK = dS^T Q, dV = P^T dO. Products of
// bfloat16 run on pairs where the machine has them, of keys in dQ and of queries in dK and dV.
#pragma once

#include "attention.h"
#include "operands.h"

namespace crossvit::CROSSVIT_ISA {

constexpr int64_t kGroupSteps = 128;  // steps of the products dK and dV that a group of queries makes, at most

// The queries are cut into groups, whose P^T and dS^T stay in L2 until K and V's gradients take them, and these into panels.
struct QueryGroups {
  int64_t vectors, count;
  QueryGroups(int64_t tokens, bool pairs)
      : vectors(ceil_div(tokens, VL)), count(ceil_div(vectors, kGroupSteps * (pairs ? 2 : 1) / VL)) {}
  int64_t first(int64_t group) const { return group * vectors / count * VL; }
  int64_t most() const { return ceil_div(vectors, count) * VL; }
};

struct AttentionGradScratch : Scratch<AttentionGradArgs> {
  static constexpr int64_t lanes = kPanelVectors * VL;
  bool pairs = kDotBf16 && a.dtype == DType::bfloat16;
  bool width_pairs = multiplies_pairs(a.dtype, a.width);
  int64_t keys_padded = round_up(a.tokens, VL);
  int64_t width_padded = round_up(a.width, VL);
  int64_t group = QueryGroups(a.tokens, pairs).most();
  float *query = floats(width_padded * lanes), *grad = floats(width_padded * lanes);
  float* out = floats(width_padded * lanes);
  float* scores = floats(2 * kBlock * lanes);
  float *keys = floats(a.tokens * width_padded), *values = floats(a.tokens * width_padded);
  float* keys_t = floats(width_padded * keys_padded);
  float* keys_f32 = floats(pairs ? width_padded * keys_padded : 0);
  float* grad_scores = floats(keys_padded * lanes);
  float *p_t = floats(keys_padded * group), *ds_t = floats(keys_padded * group);
  float *query_rows = floats(group * width_padded), *grad_rows = floats(group * width_padded);
  float *grad_keys = floats(keys_padded * width_padded), *grad_values = floats(keys_padded * width_padded);
};

// Rows [m, m + count) as the panel [row][column] that meets P^T or dS^T, as pairs of rows where asked.
inline void load_row_panel(const Rows& rows, int64_t m, int64_t count, int64_t width, bool pairs, float* to,
                           int64_t ldt) {
  if (!pairs) return load_head_rows(rows, m, count, width, to, ldt);
  HeadRows from(rows, m, width);
  for (int64_t r = 0; r < count; r += 2, to += ldt) {
    const char *even = from.next(), *odd = r + 1 < count ? from.next() : nullptr;
    for (int64_t j = 0; j < width; j += VL) {
      const int n = lanes_in(width - j);
      store(to + j, pair(load_as(rows.dtype, even, j, n), odd ? load_as(rows.dtype, odd, j, n) : Vec{}));
    }
  }
}

// Rows [m, m + count) as the panel [column][row] that meets keys or values.
inline void load_head_panel(const Rows& rows, int64_t m, int64_t count, int64_t width, bool pairs, float* to,
                            int64_t lanes) {
  if (pairs)
    load_pairs(rows, m, count, 0, width, to, lanes);
  else
    load_transposed(rows, m, count, 0, width, to, lanes);
}

// P and dS of up to kBlock keys from n on and one panel of queries: to the panel that meets K and, `column` queries into the
// group, to P^T and dS^T.
template <int NV, bool pairs>
CROSSVIT_INLINE void score_gradients(const AttentionGradArgs& a, const AttentionGradScratch& s, int64_t n,
                                     int64_t column, float scale2, const Vec* lse2, const Vec* delta) {
  constexpr int64_t lanes = NV * VL;
  const float *scores = s.scores, *grads = s.scores + kBlock * lanes;
  const int64_t count = smaller(a.tokens - n, kBlock);
  for (int64_t e = 0; e < count; e += pairs ? 2 : 1)
#pragma GCC unroll 16
    for (int v = 0; v < NV; v++) {
      const int64_t at = e * lanes + v * VL, to = (n + e) * s.group + column + v * VL;
      const Vec p = exponential2_of_nonpositive<pairs>(load(scores + at) * scale2 - lse2[v]);
      const Vec ds = p * (load(grads + at) - delta[v]);
      if constexpr (pairs) {
        // Behind the last key lies a row that nothing reads.
        const Vec q = exponential2_of_nonpositive<pairs>(load(scores + at + lanes) * scale2 - lse2[v]);
        const Vec dq = e + 1 < count ? q * (load(grads + at + lanes) - delta[v]) : Vec{};
        Bf16 *p_t = reinterpret_cast<Bf16*>(s.p_t) + to, *ds_t = reinterpret_cast<Bf16*>(s.ds_t) + to;
        store(p_t, p);
        store(p_t + s.group, q);
        store(ds_t, ds);
        store(ds_t + s.group, dq);
        store(s.grad_scores + (n + e) / 2 * lanes + v * VL, pair(ds, dq));
      } else {
        store(s.p_t + to, p);
        store(s.ds_t + to, ds);
        store(s.grad_scores + (n + e) * lanes + v * VL, ds);
      }
    }
}

// One panel of queries, `column` into its group: their gradient, and their columns of P^T and dS^T.
template <int NV>
inline void attention_grad_panel(const AttentionGradArgs& a, int64_t image, int64_t head, int64_t m, int64_t count,
                                 int64_t column, const Matrix& keys, const Matrix& values, const Matrix& keys_t,
                                 const AttentionGradScratch& s) {
  constexpr int64_t lanes = NV * VL;
  constexpr float kLog2E = 1.4426950408889634f;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(a.width));
  Vec delta[NV] = {}, lse2[NV];
  load_head_panel(head_rows(a, image, head, 0), m, count, a.width, s.width_pairs, s.query, lanes);
  load_head_panel(joined_rows(a, a.grad_out, image, head), m, count, a.width, s.width_pairs, s.grad, lanes);
  load_head_panel(joined_rows(a, a.out, image, head), m, count, a.width, s.width_pairs, s.out, lanes);
  for (int64_t j = 0; j < (s.width_pairs ? a.width / 2 : a.width); j++)
    for (int v = 0; v < NV; v++) {
      const Vec g = load(s.grad + j * lanes + v * VL), o = load(s.out + j * lanes + v * VL);
      delta[v] += s.width_pairs ? even_of(g) * even_of(o) + odd_of(g) * odd_of(o) : g * o;
    }
  const float* saved = a.lse + (image * a.heads + head) * a.tokens + m;
  for (int v = 0; v < NV; v++) {
    const int64_t here = smaller(larger(count - v * VL, 0), VL);
    lse2[v] = here ? load_n(saved + v * VL, static_cast<int>(here)) * kLog2E : Vec{};
    for (int64_t r = here; r < VL; r++) lse2[v][r] = __builtin_inff();  // no query: a probability of zero
  }

  const Panel queries{s.query, lanes, s.width_pairs}, grads{s.grad, lanes, s.width_pairs};
  for (int64_t n = 0; n < a.tokens; n += kBlock) {
    multiply_block<NV>(keys, n, a.tokens - n, a.width, queries, s.scores, lanes, nullptr);
    multiply_block<NV>(values, n, a.tokens - n, a.width, grads, s.scores + kBlock * lanes, lanes, nullptr);
    if (s.pairs)
      score_gradients<NV, true>(a, s, n, column, scale * kLog2E, lse2, delta);
    else
      score_gradients<NV, false>(a, s, n, column, scale * kLog2E, lse2, delta);
  }

  const Panel grad_scores{s.grad_scores, lanes, s.pairs};
  const int64_t depth = s.pairs ? round_up(a.tokens, 2) : a.tokens;
  for (int64_t j = 0; j < a.width; j += kBlock)
    multiply_block<NV>(keys_t, j, a.width - j, depth, grad_scores, s.out + j * lanes, lanes, nullptr);
  Rows grad_query = head_rows(a, image, head, 0);
  grad_query.data =
      static_cast<char*>(a.grad_qkv) + (image * a.tokens * 3 * a.heads + head) * a.width * size_of(a.dtype);
  grad_query.row_stride = 3 * a.heads * a.width;
  const PanelRows to(grad_query, m, count);
  for (int64_t j = 0; j < a.width; j += VL)
    for_each_row<NV>(s.out + j * lanes, lanes, count,
                     [&](int64_t r, Vec g) { to.store(r, j, g * scale, lanes_in(a.width - j)); });
}

// A group's part of the keys' and values' gradients.
template <bool accumulate>
inline void add_group(const AttentionGradArgs& a, int64_t count, const AttentionGradScratch& s) {
  const DType dtype = s.pairs ? DType::bfloat16 : DType::float32;
  const Matrix p_t{s.p_t, dtype, s.group}, ds_t{s.ds_t, dtype, s.group};
  const int64_t depth = s.pairs ? round_up(count, 2) : count;
  const PanelSplit columns(a.width);
  for (int64_t c = 0; c < columns.panels; c++)
    with_vectors(columns.vectors_of(c), [&]<int NJ>() {
      const int64_t j = columns.first(c);
      const Panel queries{s.query_rows + j, s.width_padded, s.pairs}, grads{s.grad_rows + j, s.width_padded, s.pairs};
      for (int64_t n = 0; n < a.tokens; n += kBlock)
        multiply_block<NJ, accumulate>(ds_t, n, a.tokens - n, depth, queries, s.grad_keys + n * s.width_padded + j,
                                       s.width_padded, nullptr);
      for (int64_t n = 0; n < a.tokens; n += kBlock)
        multiply_block<NJ, accumulate>(p_t, n, a.tokens - n, depth, grads, s.grad_values + n * s.width_padded + j,
                                       s.width_padded, nullptr);
    });
}

inline Plan attention_grad_plan(const AttentionGradArgs& a, int64_t) { return {a.batch * a.heads}; }
inline void attention_grad_run(const AttentionGradArgs& a, const Plan&, int64_t task, const AttentionGradScratch& s) {
  const int64_t image = task / a.heads, head = task % a.heads;
  const Rows key_rows = head_rows(a, image, head, 1), query_rows = head_rows(a, image, head, 0);
  const Rows grad_rows = joined_rows(a, a.grad_out, image, head);
  const Matrix keys = gather_head(a, key_rows, s.keys), values = gather_head(a, head_rows(a, image, head, 2), s.values);
  const Matrix keys_t = transpose_head(a, key_rows, s.pairs, s.keys_t, s.keys_f32, s.keys_padded);

  const QueryGroups groups(a.tokens, s.pairs);
  for (int64_t g = 0; g < groups.count; g++) {
    const int64_t m0 = groups.first(g), count = smaller(groups.first(g + 1), a.tokens) - m0;
    load_row_panel(query_rows, m0, count, a.width, s.pairs, s.query_rows, s.width_padded);
    load_row_panel(grad_rows, m0, count, a.width, s.pairs, s.grad_rows, s.width_padded);
    const PanelSplit split(count);
    for (int64_t p = 0; p < split.panels; p++) {
      const int64_t m = split.first(p), here = smaller(split.first(p + 1), count) - m;
      with_vectors(split.vectors_of(p), [&]<int NV>() {
        attention_grad_panel<NV>(a, image, head, m0 + m, here, m, keys, values, keys_t, s);
      });
    }
    if (g == 0)
      add_group<false>(a, count, s);
    else
      add_group<true>(a, count, s);
  }

  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(a.width));
  const int64_t stride = 3 * a.heads * a.width;
  for (int64_t which = 1; which <= 2; which++) {
    const float *from = which == 1 ? s.grad_keys : s.grad_values, factor = which == 1 ? scale : 1.0f;
    const int64_t offset = image * a.tokens * stride + (which * a.heads + head) * a.width;
    char* row = static_cast<char*>(a.grad_qkv) + offset * size_of(a.dtype);
    for (int64_t n = 0; n < a.tokens; n++, row += stride * size_of(a.dtype))
      for (int64_t j = 0; j < a.width; j += VL)
        store_as(a.dtype, row, j, load(from + n * s.width_padded + j) * factor, lanes_in(a.width - j));
  }
}

}  // namespace crossvit::CROSSVIT_ISA
