// What token_gradient.cu keeps in shared memory, and its product of a step's tokens with the pairs.
#pragma once

#include <cuda/ptx.cuh>

#include "cuda/token_tiles.cuh"
#include "cuda/warp_product.cuh"

namespace crossvit::cuda {

// Where things lie in shared memory.
struct GradientMemory {
  int pairs, vectors, weights, alongs, rings, exchange, total;
  __host__ __device__ GradientMemory(const TokenPlan& plan, int element) {
    const int groups = kTokenWarps / plan.parts, heads = 8 * plan.groups;
    pairs = 0;
    vectors = pairs + 2 * heads * row_stride(plan.columns, element) * element;  // delta and the pairs' means
    weights = vectors + 3 * heads * 4;                                          // of every warp: ds and p (2 heads, 16)
    alongs = weights + kTokenWarps * 2 * heads * kStepTokens * element;         // of every warp: (2, 16)
    rings = alongs + kTokenWarps * 2 * kStepTokens * 4;
    exchange = rings + groups * plan.stages * kStepTokens * plan.row_bytes;
    total = exchange + (plan.parts > 1 ? kTokenThreads * 32 * plan.groups : 0);
    const int sums = rings + groups * heads * (plan.columns + 5) * 4;  // when the tokens are done: of every group
    total = sums > total ? sums : total;
  }
};

// (16 tokens, 16 kGroups rows of pairs) times 16 columns of the pairs.
template <class T, bool kTf32, int kGroups>
struct TokenRows {
  std::uint32_t rows[sizeof(T) == 2 ? kGroups : 1][4];
  const T* weights;

  __device__ __forceinline__ explicit TokenRows(const T* weights) : weights(weights) {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int g = 0; g < kGroups; g++)
        ptx::load_matrices_transposed(rows[g], weights + g * 16 * kStepTokens + matrices_across(kStepTokens));
    }
  }

  __device__ __forceinline__ void multiply(float (&d)[2][4], const T* pairs, int stride) const {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int g = 0; g < kGroups; g++) {
        std::uint32_t two[4];
        ptx::load_matrices_transposed(two, pairs + g * 16 * stride + matrices_down(stride));
        const std::uint32_t first[2] = {two[0], two[1]}, second[2] = {two[2], two[3]};
        ptx::multiply(T(), d[0], rows[g], first);
        ptx::multiply(T(), d[1], rows[g], second);
      }
    } else {
      multiply_warp<kTf32, true, true>(d, weights, kStepTokens, pairs, stride, 16 * kGroups);
    }
  }
};

}  // namespace crossvit::cuda
