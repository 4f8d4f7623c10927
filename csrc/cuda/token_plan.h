// How the passes over the tokens are cut up; host code.
#pragma once

#include <algorithm>

#include "cuda/cls_cross_attention.h"
#include "cuda/launch.cuh"
#include "cuda/token_tiles.cuh"

namespace crossvit::cuda {

// bytes(plan): the shared memory of a block.
template <class Bytes>
TokenPlan plan_tokens(const Tokens& tokens, DType dtype, Bytes&& bytes) {
  const auto divide_up = [](int a, int b) { return (a + b - 1) / b; };
  const int of_x = tokens.dtype == DType::float32 || dtype == DType::float32 ? 4 : 2;
  TokenPlan plan{};
  plan.columns = divide_up(tokens.width, 16) * 16;
  plan.row_bytes = row_stride(plan.columns, of_x) * of_x;
  plan.lanes = 4;
  while (plan.lanes < 32 && plan.lanes * 24 < plan.columns) plan.lanes *= 2;
  plan.stages = 2;
  // Two blocks find room on a multiprocessor if their tokens are few enough.
  constexpr int kHalfOfHopper = 113 * 1024;
  for (plan.head_groups = tokens.heads <= 8 ? 1 : 2; plan.head_groups > 0; plan.head_groups--) {
    plan.parts = 1;
    while (plan.parts * (kMostTiles / plan.head_groups) * 16 < plan.columns) plan.parts *= 2;
    while (plan.parts < kTokenWarps && bytes(plan) > kHalfOfHopper) plan.parts *= 2;
    if (plan.parts <= kTokenWarps && bytes(plan) <= kSharedMemory) break;
  }
  if (plan.head_groups == 0) {
    plan.shared = kSharedMemory + 1;
    return plan;
  }
  plan.sets = divide_up(tokens.heads, 8 * plan.head_groups);
  const int warp_groups = kTokenWarps / plan.parts, steps = divide_up(tokens.patches + 1, kStepTokens);
  // Where images alone leave multiprocessors idle, several blocks share one.
  const std::int64_t blocks = std::max<std::int64_t>(tokens.batch * plan.sets, 1), processors = multiprocessors();
  plan.splits = 1;
  if (blocks < 0.8 * processors) {
    const int most = std::min(32, divide_up(steps, std::max(1, warp_groups / 2)));
    plan.splits = static_cast<int>(std::clamp<std::int64_t>(2 * processors / blocks, 1, most));
  }
  plan.steps = divide_up(steps, plan.splits);
  plan.splits = divide_up(steps, plan.steps);
  plan.shared = bytes(plan);
  while (plan.stages < 4 && plan.stages < divide_up(plan.steps, warp_groups)) {
    TokenPlan more = plan;
    more.stages++;
    more.shared = bytes(more);
    if (more.shared > kHalfOfHopper) break;
    plan = more;
  }
  return plan;
}

// f.operator()<T, X, kTf32, kHeadGroups>() for a pass over tokens of type X with matrix operands of type T.
template <class Args, class F>
Error with_tokens(const Args& args, F&& f) {
  return with_math(args.dtype, args.tf32, [&]<class T, bool kTf32>() {
    const auto with_groups = [&]<class X>() {
      return args.plan.head_groups == 1 ? f.template operator()<T, X, kTf32, 1>()
                                        : f.template operator()<T, X, kTf32, 2>();
    };
    if constexpr (sizeof(T) == 2)
      if (args.tokens.dtype != DType::float32) return with_groups.template operator()<T>();
    return with_groups.template operator()<float>();
  });
}

}  // namespace crossvit::cuda
