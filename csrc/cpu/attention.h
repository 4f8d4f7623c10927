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

constexpr int64_t kRowsAhead = 8;  // rows of a head by which a prefetch runs ahead: they lie far apart

// Rows of a head, one after the other.
struct HeadRows {
  const char* row;
  int64_t stride, bytes;
  HeadRows(const Rows& rows, int64_t m, int64_t width)
      : row(row_pointer(rows, m)), stride(rows.row_stride * size_of(rows.dtype)), bytes(width * size_of(rows.dtype)) {}
  CROSSVIT_INLINE const char* next() {
    const char* here = row;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(here + kRowsAhead * stride + i);
    row += stride;
    return here;
  }
};

// Rows [m, m + count) as floats, padded to whole vectors.
inline void load_head_rows(const Rows& rows, int64_t m, int64_t count, int64_t width, float* to, int64_t ldt) {
  HeadRows from(rows, m, width);
  for (int64_t r = 0; r < count; r++, to += ldt) {
    const char* row = from.next();
    for (int64_t j = 0; j < width; j += VL) store(to + j, load_as(rows.dtype, row, j, lanes_in(width - j)));
  }
}

// A head's keys or values as the matrix that meets queries or their gradients: brought together, they stay in the core's cache.
template <class Args>
inline Matrix gather_head(const Args& a, const Rows& rows, float* to) {
  if (!multiplies_pairs(a.dtype, a.width)) {
    const int64_t stride = round_up(a.width, VL);
    load_head_rows(rows, 0, a.tokens, a.width, to, stride);
    return {to, DType::float32, stride};
  }
  HeadRows from(rows, 0, a.width);
  for (int64_t n = 0; n < a.tokens; n++)
    __builtin_memcpy(reinterpret_cast<Bf16*>(to) + n * a.width, from.next(), 2 * a.width);
  return {to, DType::bfloat16, a.width};
}

// The same transposed, for a product that runs along the keys: of bfloat16 where it runs on pairs, by way of `floats`.
template <class Args>
inline Matrix transpose_head(const Args& a, const Rows& rows, bool pairs, float* to, float* floats, int64_t stride) {
  load_transposed(rows, 0, a.tokens, 0, a.width, pairs ? floats : to, stride);
  if (pairs)
    for (int64_t i = 0; i < a.width * stride; i += VL) store(reinterpret_cast<Bf16*>(to) + i, load(floats + i));
  return {to, pairs ? DType::bfloat16 : DType::float32, stride};
}

struct AttentionScratch : Scratch<AttentionArgs, SplitPlan> {
  static constexpr int64_t lanes = kPanelVectors * VL;
  int64_t keys_padded = round_up(a.tokens, VL);
  float* query = floats(round_up(a.width, 2) * lanes);
  float* keys = floats(a.tokens * round_up(a.width, VL));
  float* scores = floats(keys_padded * lanes);
  float *values = floats(a.width * keys_padded), *values_f32 = floats(a.width * keys_padded);
  float* c = floats(VL * lanes);
  float* widened = floats(kBlock * larger(a.width, keys_padded));
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
      store_n(lse + v * VL, highest[v] * scale + logarithm(sum[v]), lanes_in(count - v * VL));
  }

  const Panel probabilities{s.scores, lanes, pairs, half};
  const int64_t depth = pairs ? round_up(a.tokens, 2) : a.tokens;
  const PanelRows out(joined_rows(a, a.out, image, head), m, count);
  for (int v = 0; v < NV; v++) sum[v] = 1.0f / sum[v];
  for (int64_t j = 0; j < a.width; j += VL) {
    const int n = lanes_in(a.width - j);
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
inline void attention_run(const AttentionArgs& a, const SplitPlan& plan, int64_t task, const AttentionScratch& s) {
  const int64_t head = task / plan.splits % a.heads, image = task / plan.splits / a.heads, piece = task % plan.splits;
  const Matrix keys = gather_head(a, head_rows(a, image, head, 1), s.keys);
  const bool pairs = a.dtype == DType::bfloat16 && kDotBf16;
  const Matrix values = transpose_head(a, head_rows(a, image, head, 2), pairs, s.values, s.values_f32, s.keys_padded);
  const PanelSplit split(a.tokens);
  for (int64_t p = piece * split.panels / plan.splits; p < (piece + 1) * split.panels / plan.splits; p++) {
    const int64_t m = split.first(p), count = smaller(split.first(p + 1), a.tokens) - m;
    with_vectors(split.vectors_of(p),
                 [&]<int NV>() { attention_panel<NV>(a, image, head, m, count, keys, values, s); });
  }
}

}  // namespace crossvit::CROSSVIT_ISA
