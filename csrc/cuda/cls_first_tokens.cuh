// What several kernels of cls_cross_attention's gradient ask of a row.
#pragma once

#include <cuda_runtime.h>

#include "cuda/cls_gradients.h"
#include "cuda/types.cuh"

namespace crossvit::cuda {

__device__ __forceinline__ float sum_warp(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

__device__ __forceinline__ float first_token(const FirstTokens& first, std::int64_t image, int c) {
  const float x = load(first.cls, first.type, image * first.stride + c);
  return (x - first.mean[image * first.tokens]) * first.rstd[image * first.tokens];
}

}  // namespace crossvit::cuda
