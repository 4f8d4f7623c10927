// What token_gradient.cu keeps in shared memory, and its product of a step's weights with u and grad_context.
#pragma once

#include <cuda/ptx.cuh>

#include "cuda/token_tiles.cuh"
#include "cuda/warp_product.cuh"

namespace crossvit::cuda {

// Where things lie in shared memory, for the host and the device.
struct GradientMemory {
  Region u_grad_context;  // the rows u and grad_context of the heads
  Region vectors;         // of every head: delta and the means of its two rows
  Region weights;         // of every warp: ds and p, (2 heads, 16 tokens)
  Region sums;            // of every warp: the sums of dx^ and of dx^ x^, (2, 16 tokens)
  Region rings;           // the tokens of every warp group
  Region exchange;        // every thread's part of the scores, where warps share a step's columns
  Region grad_u;          // of every warp group, when the tokens are done, and its rest: where rings and exchange were
  int total;
  __host__ __device__ GradientMemory(const TokenPlan& plan, int element) {
    const int warp_groups = kTokenWarps / plan.parts, heads = 8 * plan.head_groups;
    u_grad_context = {0, 2 * heads * row_stride(plan.columns, element) * element};
    vectors = u_grad_context.behind(3 * heads * 4);
    weights = vectors.behind(kTokenWarps * 2 * heads * kStepTokens * element);
    sums = weights.behind(kTokenWarps * 2 * kStepTokens * 4);
    rings = sums.behind(warp_groups * plan.stages * kStepTokens * plan.row_bytes);
    exchange = rings.behind(plan.parts > 1 ? kTokenThreads * 32 * plan.head_groups : 0);
    grad_u = sums.behind(warp_groups * heads * (plan.columns + 5) * 4);
    total = exchange.end() > grad_u.end() ? exchange.end() : grad_u.end();
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
