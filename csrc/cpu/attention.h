// Multi-head self-attention, one head of one image (and some of its queries) a task. Queries are the lanes of a panel and
// keys run down it, so the softmax never crosses lanes, and the probabilities leave it as the panel that meets V.
#pragma once

#include "rows.h"
#include "tasks.h"

namespace crossvit::CROSSVIT_ISA {

constexpr int64_t kSumChain = 64;  // probabilities summed in one chain, at most

// exp((score - shift) * scale) down a panel, in place; returns the sums. As pairs two keys become one row.
template <int NV, bool pairs>
inline void exponentials(float* scores, int64_t keys, const Vec* shift, float scale, Vec* sum) {
  constexpr int64_t lanes = NV * VL;
  const float scale2 = scale * 1.4426950408889634f;
  Vec shift2[NV];
  for (int v = 0; v < NV; v++) {
    shift2[v] = shift[v] * scale2;
    sum[v] = Vec{};
  }
  constexpr int64_t step = pairs ? 2 : 1;
  for (int64_t first = 0; first < keys; first += kSumChain) {
    const int64_t last = smaller(first + kSumChain, keys);
    Vec chain[NV] = {};
    for (int64_t n = first; n < last; n += step)
#pragma GCC unroll 16
      for (int v = 0; v < NV; v++) {
        const float* from = scores + n * lanes + v * VL;
        const Vec p = exponential2_of_nonpositive<pairs>(load(from) * scale2 - shift2[v]);
        chain[v] += p;
        if constexpr (pairs) {
          const Vec q =
              n + 1 < keys ? exponential2_of_nonpositive<pairs>(load(from + lanes) * scale2 - shift2[v]) : Vec{};
          chain[v] += q;
          store(scores + n / 2 * lanes + v * VL, pair(p, q));
        } else {
          store(scores + n * lanes + v * VL, p);
        }
      }
#pragma GCC unroll 16
    for (int v = 0; v < NV; v++) sum[v] += chain[v];
  }
}

CROSSVIT_INLINE Vec logarithm(Vec x) {
  for (int i = 0; i < VL; i++) x[i] = __builtin_logf(x[i]);
  return x;
}

// One of q (0), k (1), v (2) of one image and head, as rows and as a matrix.
template <class Args>
inline Rows head_rows(const Args& a, int64_t image, int64_t head, int64_t which) {
  const DType dtype = a.dtype;
  const int64_t offset = image * a.batch_stride + (which * a.heads + head) * a.width;
  char* data = static_cast<char*>(const_cast<void*>(a.qkv)) + offset * size_of(dtype);
  return {data, dtype, a.tokens, 0, a.token_stride};
}

// The same head of a contiguous (batch, tokens, heads * width) tensor.
template <class Args>
inline Rows joined_rows(const Args& a, const void* data, int64_t image, int64_t head) {
  const int64_t offset = image * a.tokens * a.heads * a.width + head * a.width;
  return {static_cast<char*>(const_cast<void*>(data)) + offset * size_of(a.dtype), a.dtype, a.tokens, 0,
          a.heads * a.width};
}

// Rows [m, m + count), row-major as floats and zero-padded to whole vectors.
inline void load_rows(const Rows& rows, int64_t m, int64_t count, int64_t width, float* to, int64_t ldt) {
  for (int64_t r0 = 0; r0 < count; r0 += kPanelVectors * VL) {
    const int64_t here = smaller(count - r0, kPanelVectors * VL);
    const PanelRows from(rows, m + r0, here);
    for (int64_t r = 0; r < here; r++)
      for (int64_t j = 0; j < width; j += VL)
        store(to + (r0 + r) * ldt + j, from.load(r, j, static_cast<int>(smaller(width - j, VL))));
  }
}

struct AttentionScratch {
  float *query, *keys, *scores, *values, *values_f32, *c, *widened;
  int64_t keys_padded, bytes;
  AttentionScratch(const AttentionArgs& a, char* base) {
    Arena arena{base};
    const int64_t lanes = kPanelVectors * VL;
    keys_padded = round_up(a.tokens, VL);
    query = arena.floats(round_up(a.width, 2) * lanes);
    keys = arena.floats(a.tokens * round_up(a.width, VL));
    scores = arena.floats(keys_padded * lanes);
    values = arena.floats(a.width * keys_padded);
    values_f32 = arena.floats(a.width * keys_padded);
    c = arena.floats(VL * lanes);
    widened = arena.floats(kBlock * larger(a.width, keys_padded));
    bytes = arena.used;
  }
};

template <int NV>
inline void attention_panel(const AttentionArgs& a, int64_t image, int64_t head, int64_t m, int64_t count,
                            const Matrix& keys, const Matrix& values, const AttentionScratch& s) {
  constexpr int64_t lanes = NV * VL;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(a.width));
  load_transposed(head_rows(a, image, head, 0), m, count, 0, a.width, s.query, lanes);
  const bool half = NV == 1 && is_half(count);
  const Panel query{s.query, lanes, multiplies_pairs(a.dtype, a.width), half};
  if (query.pairs) pack_pairs(s.query, lanes, a.width);

  Vec highest[NV], sum[NV];
  for (int v = 0; v < NV; v++) highest[v] = broadcast(-__builtin_inff());
  for (int64_t n = 0; n < a.tokens; n += kBlock) {
    float* scores = s.scores + n * lanes;
    multiply_block<NV>(keys, n, a.tokens - n, a.width, query, scores, lanes, s.widened);
    // Rows past the last key repeat it, which the maximum does not mind.
    for (int e = 0; e < kBlock; e++)
#pragma GCC unroll 16
      for (int v = 0; v < NV; v++) highest[v] = maximum(highest[v], load(scores + e * lanes + v * VL));
  }
  const bool pairs = values.dtype == DType::bfloat16 && kDotBf16;
  if (pairs)
    exponentials<NV, true>(s.scores, a.tokens, highest, scale, sum);
  else
    exponentials<NV, false>(s.scores, a.tokens, highest, scale, sum);
  if (a.lse) {
    float* lse = a.lse + (image * a.heads + head) * a.tokens + m;
    for (int v = 0; v < NV && v * VL < count; v++)
      store_n(lse + v * VL, highest[v] * scale + logarithm(sum[v]), static_cast<int>(smaller(count - v * VL, VL)));
  }

  const Panel probabilities{s.scores, lanes, pairs, half};
  const int64_t depth = pairs ? round_up(a.tokens, 2) : a.tokens;
  const PanelRows out(joined_rows(a, a.out, image, head), m, count);
  for (int v = 0; v < NV; v++) sum[v] = 1.0f / sum[v];
  for (int64_t j = 0; j < a.width; j += VL) {
    const int n = static_cast<int>(smaller(a.width - j, VL));
    for (int64_t e = 0; e < n; e += kBlock)
      multiply_block<NV>(values, j + e, a.width - j - e, depth, probabilities, s.c + e * lanes, lanes, s.widened);
    for (int e = 0; e < n; e++)
      for (int v = 0; v < NV; v++) store(s.c + e * lanes + v * VL, load(s.c + e * lanes + v * VL) * sum[v]);
    for_each_row<NV>(s.c, lanes, count, [&](int64_t r, Vec y) { out.store(r, j, y, n); });
  }
}

inline SplitPlan attention_plan(const AttentionArgs& a, int64_t threads) {
  const int64_t heads = a.batch * a.heads, panels = PanelSplit(a.tokens).panels;
  // Pieces of a head gather its keys and values again: the fewest that keep the threads busy to the end.
  const auto idle = [&](int64_t splits) {
    return static_cast<double>(ceil_div(heads * splits, threads) * threads) / static_cast<double>(heads * splits) - 1;
  };
  SplitPlan plan;
  if (heads == 0) return plan;
  for (int64_t splits = 2; splits <= panels && idle(plan.splits) > 0.05; splits++)
    if (idle(splits) < idle(plan.splits)) plan.splits = splits;
  plan.tasks = heads * plan.splits;
  return plan;
}
inline int64_t attention_scratch(const AttentionArgs& a, const SplitPlan&) {
  return AttentionScratch(a, nullptr).bytes;
}

inline void attention_run(const AttentionArgs& a, const SplitPlan& plan, int64_t task, char* scratch) {
  const AttentionScratch s(a, scratch);
  const int64_t head = task / plan.splits % a.heads, image = task / plan.splits / a.heads, piece = task % plan.splits;
  // K and V meet every panel of queries: brought together, they stay in the core's cache. V is transposed, since the product
  // with the probabilities runs along the keys.
  const Rows key_rows = head_rows(a, image, head, 1);
  Matrix keys{s.keys, DType::float32, round_up(a.width, VL)};
  if (multiplies_pairs(a.dtype, a.width)) {
    keys = {s.keys, DType::bfloat16, a.width};
    for (int64_t n = 0; n < a.tokens; n++)
      __builtin_memcpy(reinterpret_cast<Bf16*>(s.keys) + n * a.width, row_pointer(key_rows, n), 2 * a.width);
  } else {
    load_rows(key_rows, 0, a.tokens, a.width, s.keys, keys.row_stride);
  }
  const bool pairs = a.dtype == DType::bfloat16 && kDotBf16;
  load_transposed(head_rows(a, image, head, 2), 0, a.tokens, 0, a.width, pairs ? s.values_f32 : s.values,
                  s.keys_padded);
  Matrix values{s.values, pairs ? DType::bfloat16 : DType::float32, s.keys_padded};
  if (pairs)
    for (int64_t i = 0; i < a.width * s.keys_padded; i += VL)
      store(reinterpret_cast<Bf16*>(s.values) + i, load(s.values_f32 + i));
  const PanelSplit split(a.tokens);
  for (int64_t p = piece * split.panels / plan.splits; p < (piece + 1) * split.panels / plan.splits; p++) {
    const int64_t m = split.first(p), count = smaller(split.first(p + 1), a.tokens) - m;
    with_vectors(split.vectors_of(p),
                 [&]<int NV>() { attention_panel<NV>(a, image, head, m, count, keys, values, s); });
  }
}

}  // namespace crossvit::CROSSVIT_ISA
