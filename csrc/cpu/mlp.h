// LayerNorm, Linear, GELU, Linear and residual on one panel of rows. The hidden activations leave the first product in
// the very order the second one wants them in, [hidden][rows], and never leave the core's cache.
#pragma once

#include "linear.h"

namespace crossvit::CROSSVIT_ISA {

struct MlpScratch : Scratch<MlpArgs, PanelPlan> {
  float* panel = floats(a.width * kPanelVectors * VL);
  float* hidden = floats(round_up(a.hidden, VL) * kPanelVectors * VL);
  float* c = floats(VL * kPanelVectors * VL);
  float* widened = floats(kBlock * larger(a.width, a.hidden));
  float *norm_weight = floats(a.width + VL), *norm_bias = floats(a.width + VL);
  float* b1 = floats(a.hidden + VL);
  float *b2 = floats(a.width + VL), *channels = floats(a.width + VL);
};

template <int NV>
inline void mlp_panel(const MlpArgs& a, int64_t m, int64_t count, const MlpScratch& s) {
  constexpr int64_t lanes = NV * VL;
  const Panel panel =
      prepare_panel<NV>(a.x, m, count, a.width, a.norm, false, a.w1.dtype, s.norm_weight, s.norm_bias, s.panel);
  const Panel hidden{s.hidden, lanes, multiplies_pairs(a.w2.dtype, a.hidden), panel.half};
  const PanelRows pre(a.pre, m, count);
  for (int64_t h = 0; h < a.hidden; h += VL) {
    const int n = lanes_in(a.hidden - h);
    // In float32 the product lands where the second one reads it; pairs are packed on the way from c.
    float* c = hidden.pairs ? s.c : s.hidden + h * lanes;
    multiply_columns<NV>(a.w1, h, n, a.width, panel, c, s.widened);
    if (a.pre.data && kDotBf16 && a.pre.dtype == DType::bfloat16 && n == VL) {
      store_pairs<NV>(c, lanes, count, s.b1 + h, pre, h);
    } else if (a.pre.data) {
      const Vec bias = load(s.b1 + h);
      for_each_row<NV>(c, lanes, count, [&](int64_t r, Vec y) { pre.store(r, h, y + bias, n); });
    }
    if (hidden.pairs) {
      for (int e = 0; e < n; e += 2)
#pragma GCC unroll 16
        for (int v = 0; v < NV; v++) {
          const float* at = c + e * lanes + v * VL;
          store(s.hidden + (h + e) / 2 * lanes + v * VL,
                pair(gelu_bf16(load(at) + s.b1[h + e]), gelu_bf16(load(at + lanes) + s.b1[h + e + 1])));
        }
    } else {
      for (int e = 0; e < n; e++)
#pragma GCC unroll 16
        for (int v = 0; v < NV; v++) {
          float* at = c + e * lanes + v * VL;
          store(at, gelu(load(at) + s.b1[h + e]));
        }
    }
  }
  const PanelRows out(a.out, m, count), x(a.x, m, count);
  for (int64_t e = 0; e < a.width; e += VL) {
    const int n = lanes_in(a.width - e);
    multiply_columns<NV, true>(a.w2, e, n, a.hidden, hidden, s.c, s.widened, ahead_of(out, &x, count, e));
    const Vec bias = load(s.b2 + e);
    for_each_row<NV>(s.c, lanes, count, [&](int64_t r, Vec y) {
      y += bias;
      if (a.scale.kind != Scale::none) y *= scale_of(a.scale, s.channels, m + r, e);
      out.store(r, e, x.load(r, e, n) + y, n);
    });
  }
}

inline PanelPlan mlp_plan(const MlpArgs& a, int64_t threads) {
  PanelPlan plan;
  plan.threads = threads;
  plan.tasks = PanelSplit(a.rows, threads).panels;
  return plan;
}
inline void mlp_run(const MlpArgs& a, const PanelPlan& plan, int64_t task, const MlpScratch& s) {
  const PanelSplit split(a.rows, plan.threads);
  const int64_t m = split.first(task), count = smaller(split.first(task + 1), a.rows) - m;
  load_vector(a.norm.weight, 0, a.width, 1.0f, s.norm_weight);
  load_vector(a.norm.bias, 0, a.width, 0.0f, s.norm_bias);
  load_vector(a.b1, 0, a.hidden, 0.0f, s.b1);
  load_vector(a.b2, 0, a.width, 0.0f, s.b2);
  if (a.scale.kind == Scale::channel) load_vector(a.scale.values, 0, a.width, 0.0f, s.channels);
  with_vectors(split.vectors_of(task), [&]<int NV>() { mlp_panel<NV>(a, m, count, s); });
}

}  // namespace crossvit::CROSSVIT_ISA
