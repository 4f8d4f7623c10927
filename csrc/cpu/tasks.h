// How the work of a kernel is cut into tasks, and the scratch memory that one of them has.
#pragma once

#include "gemm.h"

namespace crossvit::CROSSVIT_ISA {

// How `rows` rows are cut into panels: full ones, as many for each thread; what is left, in half vectors, in as many
// again or, with `cut` and where threads would wait, in panels that are cut by the result's columns too.
struct PanelSplit {
  static constexpr int64_t kPanelHalves = kPanelVectors * (VL / kHalf);
  int64_t halves, full, panels;
  bool by_columns;  // whether the panels behind the full ones are to be cut
  explicit PanelSplit(int64_t rows, int64_t threads = 1, bool cut = false)
      : halves(ceil_div(rows, kHalf)), full(halves / (threads * kPanelHalves) * threads) {
    const int64_t rest = halves - full * kPanelHalves, idle = round_up(rest, threads) - rest;
    by_columns = cut && 50 * idle > halves;  // to prepare a panel once more costs 2 % too
    panels = full + (by_columns ? ceil_div(rest, kPanelHalves) : smaller(rest, threads));
  }
  int64_t first(int64_t panel) const {
    if (panel <= full) return panel * kPanelVectors * VL;
    const int64_t rest = halves - full * kPanelHalves;
    return (full * kPanelHalves + ceil_div((panel - full) * rest, panels - full)) * kHalf;
  }
  int vectors_of(int64_t panel) const { return static_cast<int>(ceil_div(first(panel + 1) - first(panel), VL)); }
};

// A product's result as tasks: by panels of its rows and, where what is left of these does not divide over the threads, by its
// columns, as long as a piece is worth preparing its panel again.
inline ProductPlan plan_product(int64_t rows, int64_t columns, int64_t threads) {
  const PanelSplit split(rows, threads, true);
  ProductPlan plan;
  plan.threads = threads;
  plan.of_columns = split.by_columns ? larger(1, smaller(threads, columns / (4 * VL))) : 1;
  plan.tasks = split.full + (split.panels - split.full) * plan.of_columns;
  return plan;
}

// One of them: rows [m, m + count), which are so many vectors of lanes, and columns [begin, end).
struct PanelPiece {
  int64_t m, count, begin, end;
  int vectors;
  PanelPiece(int64_t rows, int64_t columns, const ProductPlan& plan, int64_t task) {
    const PanelSplit split(rows, plan.threads, true);
    const int64_t cut = task < split.full ? 1 : plan.of_columns, blocks = ceil_div(columns, VL);
    const int64_t panel = task < split.full ? task : split.full + (task - split.full) / cut;
    const int64_t piece = task < split.full ? 0 : (task - split.full) % cut;
    m = split.first(panel);
    count = smaller(split.first(panel + 1), rows) - m;
    vectors = split.vectors_of(panel);
    begin = piece * blocks / cut * VL;
    end = smaller((piece + 1) * blocks / cut * VL, columns);
  }
};

template <class F>
CROSSVIT_INLINE void with_vectors(int nv, F f) {
  switch (nv) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
#if defined(__aarch64__)
    case 3: return f.template operator()<3>();
#endif
    default: return f.template operator()<kPanelVectors>();
  }
}

// The scratch memory of a task, of which a kernel's struct takes aligned pieces for its members; with a null base it only measures.
template <class Args, class P = Plan>
struct Scratch {
  const Args& a;
  const P& plan;
  char* base;
  int64_t used = 0;
  float* floats(int64_t n) {
    const int64_t at = used;
    used += round_up(n * 4, 64);
    return base ? reinterpret_cast<float*>(base + at) : nullptr;
  }
};

// A kernel of the table, whose tasks have a scratch of type S.
template <auto run, class Args, class P, class S>
constexpr Kernel<Args, P> kernel_of(P (*plan)(const Args&, int64_t),
                                    void (*)(const Args&, const P&, int64_t, const S&)) {
  return {plan, [](const Args& a, const P& plan) { return S{{a, plan, nullptr}}.used; },
          [](const Args& a, const P& plan, int64_t task, char* base) { run(a, plan, task, S{{a, plan, base}}); }};
}

}  // namespace crossvit::CROSSVIT_ISA
