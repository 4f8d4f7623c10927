// What token_gradient.cu keeps in shared memory, and its product of a step's weights with u and grad_context.
#pragma once

#include <cuda/ptx.cuh>

#include "cuda/token_tiles.cuh"
#include "cuda/warp_product.cuh"

namespace crossvit::cuda {

// Where things lie in shared memory.
struct GradientMemory {
  int u_grad_context, vectors, weights, alongs, rings, exchange, total;
  __host__ __device__ GradientMemory(const TokenPlan& plan, int element) {
    const int warp_groups = kTokenWarps / plan.parts, heads = 8 * plan.head_groups;
    u_grad_context = 0;
    vectors =
        u_grad_context + 2 * heads * row_stride(plan.columns, element) * element;  // delta and the means of these rows
    weights = vectors + 3 * heads * 4;                                   // of every warp: ds and p (2 heads, 16)
    alongs = weights + kTokenWarps * 2 * heads * kStepTokens * element;  // of every warp: (2, 16)
    rings = alongs + kTokenWarps * 2 * kStepTokens * 4;
    exchange = rings + warp_groups * plan.stages * kStepTokens * plan.row_bytes;
    total = exchange + (plan.parts > 1 ? kTokenThreads * 32 * plan.head_groups : 0);
    const int grad_u =
        rings + warp_groups * heads * (plan.columns + 5) * 4;  // when the tokens are done: of every group
    total = grad_u > total ? grad_u : total;
  }
};

// The weights (16 tokens, 16 kHeadGroups rows of u and grad_context) times 16 columns of these rows.
template <class T, bool kTf32, int kHeadGroups>
struct TokenRows {
  std::uint32_t rows[sizeof(T) == 2 ? kHeadGroups : 1][4];
  const T* weights;

  __device__ __forceinline__ explicit TokenRows(const T* weights) : weights(weights) {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int g = 0; g < kHeadGroups; g++)
        ptx::load_matrices_transposed(rows[g], weights + g * 16 * kStepTokens + matrices_across(kStepTokens));
    }
  }

  __device__ __forceinline__ void multiply(float (&d)[2][4], const T* u_grad_context, int stride) const {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int g = 0; g < kHeadGroups; g++) {
        std::uint32_t two[4];
        ptx::load_matrices_transposed(two, u_grad_context + g * 16 * stride + matrices_down(stride));
        const std::uint32_t first[2] = {two[0], two[1]}, second[2] = {two[2], two[3]};
        ptx::multiply(T(), d[0], rows[g], first);
        ptx::multiply(T(), d[1], rows[g], second);
      }
    } else {
      multiply_warp<kTf32, true, true>(d, weights, kStepTokens, u_grad_context, stride, 16 * kHeadGroups);
    }
  }
};

}  // namespace crossvit::cuda
