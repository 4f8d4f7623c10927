// Products of every head with its part of a weight, one row per image and head.
#pragma once

#include "attention.h"

namespace crossvit::CROSSVIT_ISA {

// --- absorb: result[b][h] = scale * W_h^T rows[b][h], W_h the d rows of a (heads d, width) matrix ------------------------

constexpr int64_t kAbsorbColumns = kPanelVectors * VL;

inline Plan absorb_plan(const AbsorbArgs& a, int64_t) {
  return {a.batch ? a.heads * ceil_div(a.width, kAbsorbColumns) : 0};
}
struct AbsorbScratch : Scratch<AbsorbArgs> {
  float* matrix = floats(a.head_width * kAbsorbColumns);
  float* c = floats(kBlock * kAbsorbColumns);
};
inline void absorb_run(const AbsorbArgs& a, const Plan&, int64_t task, const AbsorbScratch& s) {
  const int64_t pieces = ceil_div(a.width, kAbsorbColumns);
  const int64_t head = task / pieces, j0 = task % pieces * kAbsorbColumns;
  const int64_t columns = smaller(a.width - j0, kAbsorbColumns);
  // Here the matrix is the panel, its columns the lanes.
  const Rows matrix{static_cast<char*>(const_cast<void*>(a.weight.data)) + j0 * size_of(a.weight.dtype), a.weight.dtype,
                    a.heads * a.head_width, 0, a.weight.row_stride};
  load_head_rows(matrix, head * a.head_width, a.head_width, columns, s.matrix, kAbsorbColumns);
  const Matrix rows{a.rows + head * a.head_width, DType::float32, a.heads * a.head_width};
  const Panel panel{s.matrix, kAbsorbColumns, false};
  for (int64_t b = 0; b < a.batch; b += kBlock) {
    const int64_t count = smaller(a.batch - b, kBlock);
    with_vectors(static_cast<int>(ceil_div(columns, VL)), [&]<int NV>() {
      multiply_block<NV>(rows, b, count, a.head_width, panel, s.c, kAbsorbColumns, nullptr, kScoreChunk);
    });
    for (int64_t e = 0; e < count; e++)
      for (int64_t j = 0; j < columns; j += VL)
        store_n(a.result + ((b + e) * a.heads + head) * a.width + j0 + j, load(s.c + e * kAbsorbColumns + j) * a.scale,
                lanes_in(columns - j));
  }
}

// --- project_heads: out[b][h d + e] = scale * (W_h (gamma . rows[b][h] + beta) + bias) ----------------------------------

struct ProjectHeadsScratch : Scratch<ProjectHeadsArgs> {
  float* panel = floats(a.width * kPanelVectors * VL);
  float* c = floats(VL * kPanelVectors * VL);
  float* widened = floats(kBlock * a.width);
  float *weight = floats(a.width + VL), *shift = floats(a.width + VL);
  float* bias = floats(a.head_width + VL);
};
inline Plan project_heads_plan(const ProjectHeadsArgs& a, int64_t) { return {a.heads * PanelSplit(a.batch).panels}; }
inline void project_heads_run(const ProjectHeadsArgs& a, const Plan&, int64_t task, const ProjectHeadsScratch& s) {
  const PanelSplit split(a.batch);
  const int64_t head = task % a.heads, panel_index = task / a.heads;
  const int64_t m = split.first(panel_index), count = smaller(split.first(panel_index + 1), a.batch) - m;
  load_vector(a.gamma, 0, a.width, 1.0f, s.weight);
  load_vector(a.beta, 0, a.width, 0.0f, s.shift);
  load_vector(a.bias, head * a.head_width, a.head_width, 0.0f, s.bias);
  with_vectors(split.vectors_of(panel_index), [&]<int NV>() {
    constexpr int64_t lanes = NV * VL;
    const Rows rows{const_cast<float*>(a.rows) + head * a.width, DType::float32, a.batch, 0, a.heads * a.width};
    load_transposed(rows, m, count, 0, a.width, s.panel, lanes);
    for (int64_t k = 0; k < a.width; k++)
      for (int64_t r = 0; r < lanes; r += VL)
        store(s.panel + k * lanes + r, load(s.panel + k * lanes + r) * s.weight[k] + s.shift[k]);
    const Panel panel{s.panel, lanes, false};
    const PanelRows out(a.out, m, count);
    for (int64_t e = 0; e < a.head_width; e += VL) {
      const int n = lanes_in(a.head_width - e);
      for (int64_t i = 0; i < n; i += kBlock)
        multiply_block<NV>(a.weight, head * a.head_width + e + i, n - i, a.width, panel, s.c + i * lanes, lanes,
                           s.widened, kScoreChunk);
      const Vec bias = load(s.bias + e);
      for_each_row<NV>(s.c, lanes, count,
                       [&](int64_t r, Vec y) { out.store(r, head * a.head_width + e, (y + bias) * a.scale, n); });
    }
  });
}

}  // namespace crossvit::CROSSVIT_ISA
