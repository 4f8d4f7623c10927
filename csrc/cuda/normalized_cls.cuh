// What several kernels of cls_cross_attention's gradient ask of a row.
#pragma once

#include <cuda_runtime.h>

#include "cuda/cls_cross_attention_backward.h"
#include "cuda/types.cuh"

namespace crossvit::cuda {

__device__ __forceinline__ float normalized_cls(const NormalizedCls& from, std::int64_t image, int c) {
  const float x = load(from.cls, from.dtype, image * from.stride + c);
  return (x - from.mean[image * from.tokens]) * from.rstd[image * from.tokens];
}

}  // namespace crossvit::cuda
