// LayerNorm, Linear, activation and residual on one panel of rows (layer_norm_linear, linear_residual, patch_embed).
#pragma once

#include "norm.h"

namespace crossvit::CROSSVIT_ISA {

// Rows [m, m + count) of x as a panel ready to be multiplied: normalised, activated, packed as the matrix needs it.
template <int NV>
inline Panel prepare_panel(const Rows& x, int64_t m, int64_t count, int64_t depth, const Norm& norm, bool gelu_in,
                           DType matrix, const float* norm_weight, const float* norm_bias, float* data) {
  constexpr int64_t lanes = NV * VL;
  load_transposed(x, m, count, 0, depth, data, lanes);
  if (norm.present) normalize_panel<NV>(data, depth, norm, norm_weight, norm_bias, m, count);
  if (gelu_in) gelu_panel(data, depth * lanes);
  const bool pairs = multiplies_pairs(matrix, depth);
  if (pairs) pack_pairs(data, lanes, depth);
  return {data, lanes, pairs, NV == 1 && is_half(count)};
}

// c (VL columns of the result x lanes) = rows [first, first + columns) of the matrix times the panel.
template <int NV, bool lines = false>
inline void multiply_columns(const Matrix& matrix, int64_t first, int64_t columns, int64_t depth, const Panel& panel,
                             float* c, float* widened, Ahead<lines> ahead = {}) {
  const int64_t bytes = matrix.row_stride * size_of(matrix.dtype);
  for (int64_t e = 0; e < columns; e += kBlock) {
    ahead.weights = static_cast<const char*>(matrix.data) + (first + e + kBlock) * bytes;
    multiply_block<NV, false, Ahead<lines>>(matrix, first + e, columns - e, depth, panel, c + e * panel.lanes,
                                            panel.lanes, widened, kDepthChunk, &ahead);
  }
}

// The lines of an epilogue that stores these columns and, where there is a residual, reads its.
CROSSVIT_INLINE Ahead<true> ahead_of(const PanelRows& out, const PanelRows* residual, int64_t count, int64_t column) {
  const PanelRows& read = residual ? *residual : out;
  return {nullptr, out.row, read.row, column * size_of(out.dtype), column * size_of(read.dtype), count - 1};
}

// The factor of one row and VL columns.
CROSSVIT_INLINE Vec scale_of(const Scale& scale, const float* channels, int64_t m, int64_t column) {
  if (scale.kind == Scale::channel) return load(channels + column);
  return broadcast(element(scale.values, m / scale.rows_per_sample));
}

struct LinearScratch : Scratch<LinearArgs, ProductPlan> {
  float* panel = floats(a.in * kPanelVectors * VL);
  float* c = floats(VL * kPanelVectors * VL);
  float* widened = floats(kBlock * a.in);
  float *norm_weight = floats(a.in + VL), *norm_bias = floats(a.in + VL);
  float *bias = floats(a.out_features + VL), *channels = floats(a.out_features + VL);
};

template <int NV>
inline void linear_panel(const LinearArgs& a, int64_t m, int64_t count, int64_t begin, int64_t end,
                         const LinearScratch& s) {
  Norm norm = a.norm;
  if (begin != 0) norm.mean = nullptr;  // one of the column splits writes the statistics
  const Panel panel =
      prepare_panel<NV>(a.x, m, count, a.in, norm, a.gelu_in, a.weight.dtype, s.norm_weight, s.norm_bias, s.panel);
  const PanelRows out(a.out, m, count), residual(a.residual, m, count), pre(a.pre, m, count);
  const bool plain = kDotBf16 && a.out.dtype == DType::bfloat16 && !a.pre.data && !a.gelu_out && !a.residual.data &&
                     a.scale.kind == Scale::none;
  for (int64_t e = begin; e < end; e += VL) {
    const int n = lanes_in(end - e);
    multiply_columns<NV, true>(a.weight, e, n, a.in, panel, s.c, s.widened,
                               ahead_of(out, a.residual.data ? &residual : nullptr, count, e));
    if (plain && n == VL) {
      store_pairs<NV>(s.c, panel.lanes, count, s.bias + e, out, e);
      continue;
    }
    const Vec bias = load(s.bias + e);
    for_each_row<NV>(s.c, panel.lanes, count, [&](int64_t r, Vec y) {
      y += bias;
      if (a.pre.data) pre.store(r, e, y, n);
      if (a.gelu_out) y = a.out.dtype == DType::bfloat16 ? gelu_bf16(y) : gelu(y);
      if (a.scale.kind != Scale::none) y *= scale_of(a.scale, s.channels, m + r, e);
      if (a.residual.data) y += residual.load(r, e, n);
      out.store(r, e, y, n);
    });
  }
}

inline ProductPlan linear_plan(const LinearArgs& a, int64_t threads) {
  return plan_product(a.rows, a.out_features, threads);
}

inline void linear_run(const LinearArgs& a, const ProductPlan& plan, int64_t task, const LinearScratch& s) {
  const PanelPiece piece(a.rows, a.out_features, plan, task);
  if (a.norm.present) {
    load_vector(a.norm.weight, 0, a.in, 1.0f, s.norm_weight);
    load_vector(a.norm.bias, 0, a.in, 0.0f, s.norm_bias);
  }
  load_vector(a.bias, 0, a.out_features, 0.0f, s.bias);
  if (a.scale.kind == Scale::channel) load_vector(a.scale.values, 0, a.out_features, 0.0f, s.channels);
  with_vectors(piece.vectors, [&]<int NV>() { linear_panel<NV>(a, piece.m, piece.count, piece.begin, piece.end, s); });
}

}  // namespace crossvit::CROSSVIT_ISA
