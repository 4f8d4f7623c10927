// What token_gradient.cu keeps in shared memory, and what it does with a step's tokens.
#pragma once

#include <cuda/ptx.cuh>

#include "cuda/cls_cross_attention_backward.h"
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

// What a warp does with a step's tokens, for kHeads heads from first_head on.
template <class T, class X, bool kTf32, int kHeadGroups>
struct GradientSteps {
  static constexpr int kHeads = 8 * kHeadGroups;
  using Scores = float[kHeadGroups][2][4];  // [g][i]: u . x^ and dz . x^ of the heads row8, tokens 8 i + 2 pair, + 1
  const TokenGradient& a;
  const TokenRing<X>& ring;
  std::int64_t image;
  int width, heads, tokens, first_head, heads_here, u_stride, x_stride;
  T *u_grad_context, *weights;
  float *vectors, *sums, *exchange;
  int lane, row8, pair;

  // Whether a step that is `there` has this token.
  __device__ __forceinline__ bool has(int token, bool there) const { return there && token < tokens; }

  // The rows are the u of 8 heads, the grad_context of the same heads, and so on.
  __device__ __forceinline__ void load_u_grad_context() const {
    for (int r = threadIdx.x / 32; r < 2 * kHeads; r += kTokenWarps) {
      const int h = r / 16 * 8 + r % 8, which = r / 8 % 2;
      const T* from = static_cast<const T*>(a.u_grad_context) + ((image * heads + first_head + h) * 2 + which) * width;
      for (int c = lane; c < a.plan.columns; c += 32)
        u_grad_context[r * u_stride + c] = h < heads_here && c < width ? from[c] : from_float<T>(0);
    }
    for (int h = threadIdx.x; h < kHeads; h += kTokenThreads) {
      const bool there = h < heads_here;
      const std::int64_t index = image * heads + first_head + h;
      vectors[h] = there ? a.delta[index] : 0;
      vectors[kHeads + h] = there ? a.row_means[index * 2] : 0;
      vectors[2 * kHeads + h] = there ? a.row_means[index * 2 + 1] : 0;
    }
  }

  __device__ __forceinline__ void load_probs(float (&p)[kHeadGroups][4], int first_token, bool there) const {
    const float* const probs = a.probs + (image * heads + first_head) * tokens;
#pragma unroll
    for (int g = 0; g < kHeadGroups; g++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int token = first_token + e / 2 * 8 + 2 * pair + e % 2, head = g * 8 + row8;
        p[g][e] = has(token, there) && head < heads_here ? probs[static_cast<std::int64_t>(head) * tokens + token] : 0;
      }
  }

  __device__ __forceinline__ void normalize(unsigned char* buffer, int first_token, bool there) const {
    ring.for_each_row([&](int row, int sub) {
      const int token = first_token + row;
      const bool valid = has(token, there);
      float mean = valid ? a.mean[image * tokens + token] : 0, rstd = valid ? a.rstd[image * tokens + token] : 0;
      normalize_row<T, X, true>(buffer + row * a.plan.row_bytes, valid, sub, ring.lanes, width, a.plan.columns, 0, mean,
                                rstd);
    });
    ring.sync();
  }

  __device__ __forceinline__ void score(Scores& s, const T* x) const {
#pragma unroll
    for (int g = 0; g < kHeadGroups; g++)
      multiply_warp<kTf32, false, false>(s[g], u_grad_context + g * 16 * u_stride + ring.first_tile * 16, u_stride, x,
                                         x_stride, ring.tiles * 16);
    join_parts<8 * kHeadGroups>(a.plan.parts, exchange, [&](int e) -> float& { return s[e / 8][e / 4 % 2][e % 4]; });
  }

  // ds and p, as the products take them: rounded; in shared memory and, of ds, in registers; and the sums over heads of dx^ and of
  // dx^ x^ over a token's columns, which come from these small matrices before any of dx^ is there.
  __device__ __forceinline__ void weigh(const Scores& s, const float (&p)[kHeadGroups][4], int first_token, bool there,
                                        float (&ds)[2][4], float (&rest)[kHeadGroups], float (&along_one)[4],
                                        float (&along_x)[4]) const {
    const auto rounded = [](float value) { return to_float(from_float<T>(value)); };
#pragma unroll
    for (int g = 0; g < kHeadGroups; g++) {
      const int head = g * 8 + row8;
      const float delta = vectors[head], mean_u = vectors[kHeads + head], mean_dz = vectors[2 * kHeads + head];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int i = e / 2, token = first_token + i * 8 + 2 * pair + e % 2;
        const bool valid = has(token, there) && head < heads_here;
        const float score = s[g][i][e % 2], dp = s[g][i][2 + e % 2];
        const float value = valid ? rounded(p[g][e] * (dp - delta)) : 0, prob = rounded(p[g][e]);
        ds[i][2 * g + e % 2] = value;
        rest[g] += value;
        along_one[e] += value * mean_u + prob * mean_dz;
        along_x[e] += value * score + prob * dp;
        weights[(g * 16 + row8) * kStepTokens + i * 8 + 2 * pair + e % 2] = from_float<T>(value);
        weights[(g * 16 + 8 + row8) * kStepTokens + i * 8 + 2 * pair + e % 2] = from_float<T>(prob);
      }
    }
  }

  // Hands these sums, of all heads, to the lanes that have the tokens' rows.
  __device__ __forceinline__ void share_sums(float (&along_one)[4], float (&along_x)[4]) const {
#pragma unroll
    for (int e = 0; e < 4; e++) {
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        along_one[e] += __shfl_xor_sync(~0u, along_one[e], distance);
        along_x[e] += __shfl_xor_sync(~0u, along_x[e], distance);
      }
      if (row8 == 0) {
        const int token = e / 2 * 8 + 2 * pair + e % 2;
        sums[token] = along_one[e];
        sums[kStepTokens + token] = along_x[e] / width;
      }
    }
    __syncwarp();
  }

  // A gradient of T takes the tokens' place in shared memory, from where it is stored in 16 bytes.
  __device__ __forceinline__ bool in_place() const { return sizeof(T) == sizeof(X) && a.plan.sets == 1; }

  // The gradient of the step's tokens, tile by tile of their columns: through the LayerNorm, or that of the CLS token as it is.
  __device__ __forceinline__ void make_gradients(T* x, int first_token, bool there) const {
    float one[2], along[2], rstd[2];
    bool valid[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int token = first_token + row8 + 8 * r;
      valid[r] = has(token, there);
      one[r] = sums[row8 + 8 * r], along[r] = sums[kStepTokens + row8 + 8 * r];
      rstd[r] = valid[r] ? a.rstd[image * tokens + token] : 0;
    }
    const bool kept = in_place();
    const std::int64_t first_row = image * (tokens - 1) + first_token - 1;
    const TokenRows<T, kTf32, kHeadGroups> rows(weights);
#pragma unroll 1
    for (int j = 0; j < ring.tiles; j++) {
      float d[2][4] = {};
      rows.multiply(d, u_grad_context + (ring.first_tile + j) * 16, u_stride);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int half = e / 2, r = e % 2, c = j * 16 + half * 8 + 2 * pair, column = ring.first_tile * 16 + c;
        const int token = first_token + row8 + 8 * r;
        T* at_x = x + (row8 + 8 * r) * x_stride + c;
        float g[2];
#pragma unroll
        for (int q = 0; q < 2; q++) {
          const float raw = d[half][2 * r + q];
          if (token == 0 && a.grad_normalized && column + q < width) {
            float* to = a.grad_normalized + image * width + column + q;
            *to = a.set == 0 ? raw : *to + raw;
          }
          g[q] = rstd[r] * ((raw - one[r]) - to_float(at_x[q]) * along[r]);
        }
        if (!a.grad_patches.data) continue;
        if (kept) {
          if constexpr (sizeof(T) == 2) {
            *reinterpret_cast<std::uint32_t*>(at_x) = pack<T>(g[0], g[1]);
          } else {
            *reinterpret_cast<float2*>(at_x) = make_float2(g[0], g[1]);
          }
        } else if (valid[r] && token > 0) {
          store_pair((first_row + row8 + 8 * r) * width + column, column, g);
        }
      }
    }
  }

  // Two neighbours of a gradient that does not go through shared memory, the sets of heads before added.
  __device__ __forceinline__ void store_pair(std::int64_t index, int column, float (&g)[2]) const {
#pragma unroll
    for (int q = 0; q < 2; q++)
      if (a.earlier && column + q < width) g[q] += a.earlier[index + q];
    if (a.grad_aligned && a.grad_patches.dtype == DType::float32 && column < width) {
      *reinterpret_cast<float2*>(static_cast<float*>(a.grad_patches.data) + index) = make_float2(g[0], g[1]);
    } else {
#pragma unroll
      for (int q = 0; q < 2; q++)
        if (column + q < width) store(a.grad_patches, index + q, g[q]);
    }
  }

  // The gradient that took the tokens' place: a warp stores its own columns, with `lanes` lanes to a row.
  __device__ __forceinline__ void store_rows(const T* x, int first_token, bool there) const {
    constexpr int kChunk = Chunk<T>::kSize;
    const int columns = min(ring.tiles * 16, width - ring.first_tile * 16), lanes = ring.lanes;
    const std::int64_t first_row = image * (tokens - 1) + first_token - 1;
    for (int row = lane / lanes; row < kStepTokens; row += 32 / lanes) {
      const int token = first_token + row;
      if (!there || token == 0 || token >= tokens) continue;
      T* to = static_cast<T*>(a.grad_patches.data) + (first_row + row) * width + ring.first_tile * 16;
      const T* from = x + row * x_stride;
      if (a.grad_aligned) {
        for (int c = lane % lanes * kChunk; c < columns; c += lanes * kChunk)
          *reinterpret_cast<uint4*>(to + c) = *reinterpret_cast<const uint4*>(from + c);
      } else {
        for (int c = lane % lanes; c < columns; c += lanes) to[c] = from[c];
      }
    }
  }

  // Adds grad_u and rest of the block's warp groups in their order, in `of_warp_groups`, to the results of this split.
  __device__ __forceinline__ void join_warp_groups(const float (&grad_u)[kTiles<kHeadGroups>][kHeadGroups][4],
                                                   float (&rest)[kHeadGroups], int split, float* of_warp_groups) const {
    const int warp_groups = kTokenWarps / a.plan.parts, warp = threadIdx.x / 32, group = warp / a.plan.parts;
    const int stride = a.plan.columns + 4;
    float* const rests = of_warp_groups + warp_groups * kHeads * stride;
#pragma unroll
    for (int g = 0; g < kHeadGroups; g++) {
      float* to = of_warp_groups + (group * kHeads + g * 8 + 2 * pair) * stride + ring.first_tile * 16 + row8;
#pragma unroll
      for (int j = 0; j < kTiles<kHeadGroups>; j++) {
        if (j < ring.tiles) {
          to[j * 16] = grad_u[j][g][0], to[j * 16 + stride] = grad_u[j][g][1];
          to[j * 16 + 8] = grad_u[j][g][2], to[j * 16 + stride + 8] = grad_u[j][g][3];
        }
      }
      rest[g] += __shfl_xor_sync(~0u, rest[g], 1);
      rest[g] += __shfl_xor_sync(~0u, rest[g], 2);
      if (ring.part == 0 && pair == 0) rests[group * kHeads + g * 8 + row8] = rest[g];
    }
    __syncthreads();
    const std::int64_t row = (image * a.plan.splits + split) * heads + first_head;
    for (int h = warp; h < heads_here; h += kTokenWarps) {
      for (int c = lane; c < width; c += 32) {
        float sum = 0;
        for (int i = 0; i < warp_groups; i++) sum += of_warp_groups[(i * kHeads + h) * stride + c];
        a.grad_u[(row + h) * width + c] = sum;
      }
      if (lane == 0) {
        float sum = 0;
        for (int i = 0; i < warp_groups; i++) sum += rests[i * kHeads + h];
        a.rest[row + h] = sum;
      }
    }
  }
};

}  // namespace crossvit::cuda
