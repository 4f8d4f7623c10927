// cls_cross_attention's pass over the tokens: every token is read once, for its statistics, its scores and its share of the
// contexts z. A warp holds z^T, 192 (or, of more than 8 heads, 96) columns of it, in 48 registers.
#include <cassert>
#include <cuda/ptx.cuh>

#include "cuda/launch.cuh"
#include "cuda/token_plan.h"
#include "cuda/token_tiles.cuh"
#include "cuda/warp_product.cuh"

namespace crossvit::cuda {

namespace {

constexpr float kInfinity = __builtin_huge_valf();

// Where things lie in shared memory, for the host and the device.
struct PassMemory {
  Region u;         // the heads' u, of 16 bits as the sum of two numbers
  Region rings;     // the tokens of every warp group
  Region exchange;  // every thread's part of the scores, where warps share a step's columns
  Region contexts;  // of every warp group, when the tokens are done: where rings and exchange were
  int total;
  __host__ __device__ PassMemory(const TokenPlan& plan, int element) {
    const int warp_groups = kTokenWarps / plan.parts, heads = 8 * plan.head_groups;
    u = {0, (element == 2 ? 2 : 1) * heads * row_stride(plan.columns, element) * element};
    rings = u.behind(warp_groups * plan.stages * kStepTokens * plan.row_bytes);
    exchange = rings.behind(plan.parts > 1 ? kTokenThreads * 16 * plan.head_groups : 0);
    contexts = u.behind(warp_groups * heads * ((plan.columns + 4) + 3) * 4);
    total = exchange.end() > contexts.end() ? exchange.end() : contexts.end();
  }
};

template <class T>
__device__ __forceinline__ float exponential(float x) {
  return sizeof(T) == 2 ? __expf(x) : expf(x);
}

template <class T, class X, bool kTf32, int kHeadGroups>
__global__ void __launch_bounds__(kTokenThreads,
                                  sizeof(T) == 2 && (kHeadGroups == 1 || sizeof(X) == 2) ? kTokenBlocks : 1)
    token_pass_kernel(const TokenPass a) {
  // u in 16 bits alone would cost sharp scores their place; of up to 8 heads the rest is for nothing: the matrix
  // instruction has 16 rows.
  constexpr bool kSplit = sizeof(T) == 2;
  const TokenPlan& plan = a.plan;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, pair = lane % 4;
  const int warp_groups = kTokenWarps / plan.parts, group = warp / plan.parts;
  const int set = blockIdx.x % plan.sets, split = blockIdx.x / plan.sets % plan.splits;
  const std::int64_t image = blockIdx.x / (plan.sets * plan.splits);
  const int width = a.tokens.width, heads = a.tokens.heads, tokens = a.tokens.patches + 1;
  const int first_head = set * 8 * kHeadGroups, heads_here = min(heads - first_head, 8 * kHeadGroups);

  unsigned char* const memory = ptx::shared_memory();
  const PassMemory at(plan, sizeof(T));
  T* const u = at.u.in<T>(memory);
  float* const exchange = at.exchange.in<float>(memory);
  const int u_stride = row_stride(plan.columns, sizeof(T)), x_stride = plan.row_bytes / static_cast<int>(sizeof(T));
  const TokenRing<X> ring(a.tokens, plan, at.rings.in<unsigned char>(memory), image);

  const int first_tile = ring.first_tile, tiles = ring.tiles;
  float z[kTiles<kHeadGroups>][kHeadGroups][4] = {};
  float highest[kHeadGroups], total[kHeadGroups];
#pragma unroll
  for (int g = 0; g < kHeadGroups; g++) highest[g] = -kInfinity, total[g] = 0;

  const auto load_u = [&] {
    for (int h = warp; h < 8 * kHeadGroups; h += kTokenWarps) {
      const float* from = a.key_query + (image * heads + first_head + h) * width;
      for (int c = lane; c < plan.columns; c += 32) {
        const bool there = h < heads_here && c < width;
        const float value = there ? from[c] * load(a.norm_weight, c) : 0;
        const T high = from_float<T>(value);
        u[h * u_stride + c] = high;
        if constexpr (kSplit) u[(h + 8 * kHeadGroups) * u_stride + c] = from_float<T>(remainder_of(value, high));
      }
    }
  };

  const int first_step = split * plan.steps;
  const int last_step = min(first_step + plan.steps, (tokens + kStepTokens - 1) / kStepTokens);
  ring.for_each_step(first_step, last_step, load_u, [&](int step, unsigned char* buffer, bool there) {
    const int first_token = step * kStepTokens;
    ring.for_each_row([&](int row, int sub) {
      const int token = first_token + row;
      const bool valid = there && token < tokens;
      float mean, rstd;
      normalize_row<T, X, false>(buffer + row * plan.row_bytes, valid, sub, ring.lanes, width, plan.columns, a.eps,
                                 mean, rstd);
      if (a.mean && valid && sub == 0 && set == 0) {
        a.mean[image * tokens + token] = mean;
        a.rstd[image * tokens + token] = rstd;
      }
    });
    ring.sync();

    // s[i]: heads group (and group + 8), tokens 8 i + 2 pair, + 1
    const T* x = reinterpret_cast<const T*>(buffer);
    float s[2][4] = {};
    multiply_warp<kTf32, false, false, kHeadGroups == 1 && !kSplit>(s, u + first_tile * 16, u_stride,
                                                                    x + first_tile * 16, x_stride, tiles * 16);
    if constexpr (kSplit && kHeadGroups == 1) {
#pragma unroll
      for (int i = 0; i < 2; i++) s[i][0] += s[i][2], s[i][1] += s[i][3];
    } else if constexpr (kSplit) {
      multiply_warp<kTf32, false, false>(s, u + 16 * u_stride + first_tile * 16, u_stride, x + first_tile * 16,
                                         x_stride, tiles * 16);
    }
    if (plan.parts > 1) {
      // Every warp adds the parts of its group in the same order.
      constexpr int kWords = 4 * kHeadGroups;
      float* mine = exchange + static_cast<int>(threadIdx.x) * kWords;
#pragma unroll
      for (int e = 0; e < kWords; e++) mine[e] = s[e / (2 * kHeadGroups)][e % (2 * kHeadGroups)];
      __syncthreads();
#pragma unroll
      for (int e = 0; e < kWords; e++) s[e / (2 * kHeadGroups)][e % (2 * kHeadGroups)] = 0;
      for (int part = 0; part < plan.parts; part++) {
        const float* other = exchange + ((group * plan.parts + part) * 32 + lane) * kWords;
#pragma unroll
        for (int e = 0; e < kWords; e++) s[e / (2 * kHeadGroups)][e % (2 * kHeadGroups)] += other[e];
      }
    }

    float shrink[kHeadGroups];
    bool higher = false;
#pragma unroll
    for (int g = 0; g < kHeadGroups; g++) {
      float best = -kInfinity;
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float& score = s[e / 2][2 * g + e % 2];
        const int token = first_token + e / 2 * 8 + 2 * pair + e % 2, head = g * 8 + lane / 4;
        const bool valid = there && token < tokens;
        if (a.scores && valid && head < heads_here && ring.part == 0)
          a.scores[(image * heads + first_head + head) * tokens + token] = score;
        score = valid ? score : -kInfinity;
        best = fmaxf(best, score);
      }
      best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
      best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
      const float now = fmaxf(highest[g], best), finite = now == -kInfinity ? 0 : now;
      higher |= now > highest[g];
      shrink[g] = exponential<T>(highest[g] - finite);
      highest[g] = now;
      float sum = 0;
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float& score = s[e / 2][2 * g + e % 2];
        sum += score = exponential<T>(score - finite);
      }
      total[g] = total[g] * shrink[g] + sum;
    }
    if (__any_sync(~0u, higher)) {
#pragma unroll
      for (int g = 0; g < kHeadGroups; g++) {
        // A lane's sums are of the heads 2 pair and 2 pair + 1.
        const float even = __shfl_sync(~0u, shrink[g], pair * 8), odd = __shfl_sync(~0u, shrink[g], pair * 8 + 4);
#pragma unroll
        for (int t = 0; t < kTiles<kHeadGroups>; t++) {
          z[t][g][0] *= even, z[t][g][1] *= odd;
          z[t][g][2] *= even, z[t][g][3] *= odd;
        }
      }
    }
    const TokenWeights<T, kTf32, kHeadGroups> weights(s);
#pragma unroll
    for (int t = 0; t < kTiles<kHeadGroups>; t++)
      if (t < tiles) weights.multiply(z[t], x + (first_tile + t) * 16, x_stride, s);
  });

  // The warp groups of the block join in their order.
  __syncthreads();
  const int z_stride = plan.columns + 4;  // 8 lanes of adjacent columns, 4 of every other head: no bank twice
  float* const contexts = at.contexts.in<float>(memory);
  float* const of_group =
      contexts + warp_groups * 8 * kHeadGroups * z_stride;  // (3, warp_groups, heads): highest, total, share
#pragma unroll
  for (int g = 0; g < kHeadGroups; g++) {
    float* to = contexts + (group * 8 * kHeadGroups + g * 8 + 2 * pair) * z_stride + lane / 4;
#pragma unroll
    for (int t = 0; t < kTiles<kHeadGroups>; t++) {
      if (t < tiles) {
        float* column = to + (first_tile + t) * 16;
        column[0] = z[t][g][0], column[z_stride] = z[t][g][1];
        column[8] = z[t][g][2], column[z_stride + 8] = z[t][g][3];
      }
    }
    total[g] += __shfl_xor_sync(~0u, total[g], 1);
    total[g] += __shfl_xor_sync(~0u, total[g], 2);
    if (ring.part == 0 && pair == 0) {
      const int index = group * 8 * kHeadGroups + g * 8 + lane / 4;
      of_group[index] = highest[g];
      of_group[warp_groups * 8 * kHeadGroups + index] = total[g];
    }
  }
  __syncthreads();
  const int of_all = warp_groups * 8 * kHeadGroups;
  const std::int64_t row = (image * plan.splits + split) * heads + first_head;
  if (static_cast<int>(threadIdx.x) < heads_here) {
    const int h = threadIdx.x;
    float most = -kInfinity, sum = 0;
    for (int i = 0; i < warp_groups; i++) most = fmaxf(most, of_group[i * 8 * kHeadGroups + h]);
    const float finite = most == -kInfinity ? 0 : most;
    for (int i = 0; i < warp_groups; i++) {
      const float share = exponential<T>(of_group[i * 8 * kHeadGroups + h] - finite);
      of_group[2 * of_all + i * 8 * kHeadGroups + h] = share;
      sum += share * of_group[of_all + i * 8 * kHeadGroups + h];
    }
    if (plan.splits == 1)
      for (int i = 0; i < warp_groups; i++) of_group[2 * of_all + i * 8 * kHeadGroups + h] /= sum;
    float* softmax = a.softmax + (image * plan.splits + split) * 2 * heads + first_head + h;
    softmax[0] = most;
    softmax[heads] = sum;
  }
  __syncthreads();
  for (int h = warp; h < heads_here; h += kTokenWarps) {
    float* to = a.context + (row + h) * width;
    for (int c = lane; c < width; c += 32) {
      float sum = 0;
      for (int i = 0; i < warp_groups; i++)
        sum = fmaf(contexts[(i * 8 * kHeadGroups + h) * z_stride + c], of_group[2 * of_all + i * 8 * kHeadGroups + h],
                   sum);
      to[c] = sum;
    }
  }
}

}  // namespace

TokenPlan plan_token_pass(const Tokens& tokens, DType dtype) {
  return plan_tokens(tokens, dtype, [&](const TokenPlan& plan) {
    const PassMemory at(plan, dtype == DType::float32 ? 4 : 2);
    assert(in_order(at.u, at.rings, at.exchange) && in_order(at.u, at.contexts));
    return at.total;
  });
}

Error token_pass(const TokenPass& args, Stream stream) {
  if (args.tokens.batch == 0) return nullptr;
  return with_tokens(args, [&]<class T, class X, bool kTf32, int kHeadGroups>() {
    const std::int64_t blocks = args.tokens.batch * args.plan.splits * args.plan.sets;
    return launch(token_pass_kernel<T, X, kTf32, kHeadGroups>, blocks, kTokenThreads, args.plan.shared, stream, args);
  });
}

}  // namespace crossvit::cuda
