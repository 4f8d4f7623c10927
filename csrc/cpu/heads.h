// Products of every head with its part of a weight, one row per image and head.
#pragma once

#include "rows.h"
#include "tasks.h"

namespace crossvit::CROSSVIT_ISA {

// --- absorb: result[b][h] = scale * W_h^T rows[b][h], W_h the d rows of a (heads d, width) matrix ------------------------

constexpr int64_t kAbsorbColumns = kPanelVectors * VL;

inline Plan absorb_plan(const AbsorbArgs& a, int64_t) {
  return {a.batch ? a.heads * ceil_div(a.width, kAbsorbColumns) : 0};
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
inline int64_t absorb_scratch(const AbsorbArgs& a, const Plan&) { return AbsorbScratch(a, nullptr).bytes; }

inline void absorb_run(const AbsorbArgs& a, const Plan&, int64_t task, char* scratch) {
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
inline Plan project_heads_plan(const ProjectHeadsArgs& a, int64_t) { return {a.heads * PanelSplit(a.batch).panels}; }
inline int64_t project_heads_scratch(const ProjectHeadsArgs& a, const Plan&) {
  return ProjectHeadsScratch(a, nullptr).bytes;
}

inline void project_heads_run(const ProjectHeadsArgs& a, const Plan&, int64_t task, char* scratch) {
  const ProjectHeadsScratch s(a, scratch);
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

}  // namespace crossvit::CROSSVIT_ISA
