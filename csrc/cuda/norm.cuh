// LayerNorm of rows by eight lanes each: two passes over x - x[0], exact where the mean dwarfs the deviation.
#pragma once

#include <cuda_runtime.h>

#include "cuda/types.cuh"

namespace crossvit::cuda {

constexpr int kLanesPerRow = 8;

struct RowStatistics {
  float origin, shift, rstd;  // the mean is origin + shift
};

// The sum of f(v) over the elements v of a row of `width`, by eight lanes: read(column, v) gives kSize elements from
// `column` on, a multiple of kSize; those behind the width do not count.
template <int kSize, class Read, class F>
__device__ __forceinline__ float row_sum(int width, Read&& read, F&& f) {
  float total = 0;
  for (int column = static_cast<int>(threadIdx.x) % kLanesPerRow * kSize; column < width;
       column += kLanesPerRow * kSize) {
    float v[kSize];
    read(column, v);
    if (column + kSize <= width) {
#pragma unroll
      for (int e = 0; e < kSize; e++) v[e] = f(v[e]);
    } else {
#pragma unroll
      for (int e = 0; e < kSize; e++) v[e] = column + e < width ? f(v[e]) : 0.0f;
    }
#pragma unroll
    for (int distance = kSize / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int e = 0; e < distance; e++) v[e] += v[e + distance];
    }
    total += v[0];
  }
  return sum_lanes<kLanesPerRow>(total);
}

// The statistics of one row, by eight lanes; `origin` is its first element.
template <int kSize, class Read>
__device__ __forceinline__ RowStatistics row_statistics(int width, float eps, float origin, Read&& read) {
  const float shift = row_sum<kSize>(width, read, [&](float x) { return x - origin; }) / width;
  const float squares = row_sum<kSize>(width, read, [&](float x) {
    const float difference = x - origin - shift;
    return difference * difference;
  });
  return {origin, shift, rsqrtf(squares / width + eps)};
}

// Copies LayerNorm's weight and bias (zero where there is none) to shared memory as floats, `width` each.
__device__ __forceinline__ void load_affine(float* affine, int width, const Vector& weight, const Vector& bias) {
  for (int c = threadIdx.x; c < width; c += blockDim.x) {
    affine[c] = load(weight, c);
    affine[width + c] = load_or_zero(bias, c);
  }
}

}  // namespace crossvit::cuda
