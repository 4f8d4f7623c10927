// The contexts z of 16 images and one head, as the pass over the tokens left them.
#pragma once

#include "cuda/cls_cross_attention.h"
#include "cuda/cls_rows.cuh"

namespace crossvit::cuda {

// Floats that join_contexts needs in shared memory.
constexpr int kShares = kImages * 34;

// Reads the running softmaxes of all splits into `shares` (16, 34): a split's share of the whole, then the highest score
// and the sum of all weights. Behind it all threads have met.
__device__ __forceinline__ void read_shares(const SplitContexts& from, std::int64_t image, int rows, int heads,
                                            int head, float* shares) {
  const int lane = threadIdx.x % 32;
  for (int r = threadIdx.x / 32; r < rows; r += kRowWarps) {
    const float* softmax = from.softmax + (((image + r) * from.splits + lane) * 2) * heads + head;
    const bool there = lane < from.splits;
    const float highest = there ? softmax[0] : -__builtin_huge_valf(), total = there ? softmax[heads] : 0;
    float most = highest;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, distance));
    const float share = there ? expf(highest - (most == -__builtin_huge_valf() ? 0 : most)) : 0;
    float sum = there ? share * total : 0;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    // One split has divided by the sum already.
    shares[r * 34 + lane] = from.splits == 1 ? 1 : share / sum;
    if (lane == 0) shares[r * 34 + 32] = most, shares[r * 34 + 33] = sum;
  }
  __syncthreads();
}

// gamma z + beta to shared memory (16, width), zeros behind and below.
template <class T>
__device__ __forceinline__ void join_contexts(const SplitContexts& from, std::int64_t image, int rows, int heads,
                                              int head, int width, const Affine& affine, const float* shares, T* to,
                                              int stride) {
  const std::int64_t step = static_cast<std::int64_t>(heads) * width;
  for (int c = threadIdx.x; c < round_up(width, 16); c += kRowThreads) {
#pragma unroll 4
    for (int r = 0; r < kImages; r++) {
      float y = 0;
      if (r < rows && c < width) {
        const float* z = from.context + ((image + r) * from.splits * heads + head) * width + c;
        float sum = 0;
        if (from.splits == 1) {
          sum = z[0];
        } else {
#pragma unroll 4
          for (int s = 0; s < from.splits; s++) sum = fmaf(z[s * step], shares[r * 34 + s], sum);
          if (from.joined) from.joined[((image + r) * heads + head) * width + c] = sum;
        }
        y = affine(sum, c);
      }
      to[r * stride + c] = from_float<T>(y);
    }
  }
}

}  // namespace crossvit::cuda
