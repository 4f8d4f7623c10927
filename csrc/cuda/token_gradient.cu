// The tokens' part of cls_cross_attention's gradient: one more pass over them, steps of 16 tokens as in token_pass.cu. The
// rows u_h and dz_h of 8 heads are the 16 rows of one product, which gives scores and dp of a token to the same lane.
#include "cuda/cls_cross_attention_backward.h"

#include <cassert>
#include <cuda/ptx.cuh>

#include "cuda/launch.cuh"
#include "cuda/token_gradient.cuh"
#include "cuda/token_plan.h"
#include "cuda/token_tiles.cuh"
#include "cuda/warp_product.cuh"

namespace crossvit::cuda {

namespace {

template <class T, class X, bool kTf32, int kHeadGroups>
__global__ void __launch_bounds__(kTokenThreads, kHeadGroups == 1 && sizeof(T) == 2 ? kTokenBlocks : 1)
    token_gradient_kernel(const TokenGradient a) {
  constexpr int kHeads = 8 * kHeadGroups;
  const TokenPlan& plan = a.plan;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row8 = lane / 4, pair = lane % 4;
  const int warp_groups = kTokenWarps / plan.parts, group = warp / plan.parts;
  const int split = blockIdx.x % plan.splits;
  const std::int64_t image = blockIdx.x / plan.splits;
  const int width = a.tokens.width, heads = a.tokens.heads, tokens = a.tokens.patches + 1;
  const int first_head = a.set * kHeads, heads_here = min(heads - first_head, kHeads);

  unsigned char* const memory = ptx::shared_memory();
  const GradientMemory at(plan, sizeof(T));
  T* const u_grad_context = at.u_grad_context.in<T>(memory);
  float* const vectors = at.vectors.in<float>(memory);
  T* const weights = at.weights.in<T>(memory) + warp * (2 * kHeads * kStepTokens);
  float* const sums = at.sums.in<float>(memory) + warp * (2 * kStepTokens);
  float* const exchange = at.exchange.in<float>(memory);
  const int row_of_u_stride = row_stride(plan.columns, sizeof(T)),
            x_stride = plan.row_bytes / static_cast<int>(sizeof(T));
  const TokenRing<X> ring(a.tokens, plan, at.rings.in<unsigned char>(memory), image);

  float grad_u[kTiles<kHeadGroups>][kHeadGroups][4] = {};
  float rest[kHeadGroups] = {};
  const float* const probs = a.probs + (image * heads + first_head) * tokens;

  // The rows are the u of 8 heads, the grad_context of the same heads, and so on.
  const auto load_u_grad_context = [&] {
    for (int r = warp; r < 2 * kHeads; r += kTokenWarps) {
      const int h = r / 16 * 8 + r % 8, which = r / 8 % 2;
      const T* from = static_cast<const T*>(a.u_grad_context) + ((image * heads + first_head + h) * 2 + which) * width;
      for (int c = lane; c < plan.columns; c += 32)
        u_grad_context[r * row_of_u_stride + c] = h < heads_here && c < width ? from[c] : from_float<T>(0);
    }
    for (int h = threadIdx.x; h < kHeads; h += kTokenThreads) {
      const bool there = h < heads_here;
      const std::int64_t index = image * heads + first_head + h;
      vectors[h] = there ? a.delta[index] : 0;
      vectors[kHeads + h] = there ? a.row_means[index * 2] : 0;
      vectors[2 * kHeads + h] = there ? a.row_means[index * 2 + 1] : 0;
    }
  };

  const int first_step = split * plan.steps;
  const int last_step = min(first_step + plan.steps, (tokens + kStepTokens - 1) / kStepTokens);
  ring.for_each_step(first_step, last_step, load_u_grad_context, [&](int step, unsigned char* buffer, bool there) {
    const int first_token = step * kStepTokens;
    float p[kHeadGroups][4];
#pragma unroll
    for (int g = 0; g < kHeadGroups; g++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int token = first_token + e / 2 * 8 + 2 * pair + e % 2, head = g * 8 + row8;
        const bool valid = there && token < tokens && head < heads_here;
        p[g][e] = valid ? probs[static_cast<std::int64_t>(head) * tokens + token] : 0;
      }
    ring.for_each_row([&](int row, int sub) {
      const int token = first_token + row;
      const bool valid = there && token < tokens;
      float mean = valid ? a.mean[image * tokens + token] : 0, rstd = valid ? a.rstd[image * tokens + token] : 0;
      normalize_row<T, X, true>(buffer + row * plan.row_bytes, valid, sub, ring.lanes, width, plan.columns, 0, mean,
                                rstd);
    });
    ring.sync();

    // s[g][i]: u . x^ and dz . x^ of the heads row8, tokens 8 i + 2 pair, + 1
    T* const x = reinterpret_cast<T*>(buffer) + ring.first_tile * 16;
    float s[kHeadGroups][2][4] = {};
#pragma unroll
    for (int g = 0; g < kHeadGroups; g++)
      multiply_warp<kTf32, false, false>(s[g], u_grad_context + g * 16 * row_of_u_stride + ring.first_tile * 16,
                                         row_of_u_stride, x, x_stride, ring.tiles * 16);
    if (plan.parts > 1) {
      float* mine = exchange + static_cast<int>(threadIdx.x) * (8 * kHeadGroups);
#pragma unroll
      for (int e = 0; e < 8 * kHeadGroups; e++) mine[e] = s[e / 8][e / 4 % 2][e % 4];
      __syncthreads();
#pragma unroll
      for (int e = 0; e < 8 * kHeadGroups; e++) s[e / 8][e / 4 % 2][e % 4] = 0;
      for (int part = 0; part < plan.parts; part++) {
        const float* other = exchange + ((group * plan.parts + part) * 32 + lane) * (8 * kHeadGroups);
#pragma unroll
        for (int e = 0; e < 8 * kHeadGroups; e++) s[e / 8][e / 4 % 2][e % 4] += other[e];
      }
    }

    // The weights as the products take them: rounded.
    const auto rounded = [](float value) { return to_float(from_float<T>(value)); };
    float ds[2][4] = {}, along_one[4] = {}, along_x[4] = {};
    __syncwarp();  // of the step before, everyone has read weights and sums
#pragma unroll
    for (int g = 0; g < kHeadGroups; g++) {
      const int head = g * 8 + row8;
      const float delta = vectors[head], mean_u = vectors[kHeads + head], mean_dz = vectors[2 * kHeads + head];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int i = e / 2, token = first_token + i * 8 + 2 * pair + e % 2;
        const bool valid = there && token < tokens && head < heads_here;
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
    {
      const TokenWeights<T, kTf32, kHeadGroups> grad_scores(ds);
#pragma unroll
      for (int j = 0; j < kTiles<kHeadGroups>; j++)
        if (j < ring.tiles) grad_scores.multiply(grad_u[j], x + j * 16, x_stride, ds);
    }
    if (!a.grad_patches.data && !(a.grad_normalized && step == 0)) return;

    // The sums of dx^ and dx^ x^ over a token's columns come from the small matrices, before any of dx^ is there.
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
    float one[2], along[2], rstd[2];
    bool valid[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int token = first_token + row8 + 8 * r;
      valid[r] = there && token < tokens;
      one[r] = sums[row8 + 8 * r], along[r] = sums[kStepTokens + row8 + 8 * r];
      rstd[r] = valid[r] ? a.rstd[image * tokens + token] : 0;
    }
    // A gradient of T takes the tokens' place in shared memory, from where it is stored in 16 bytes.
    const bool in_place = sizeof(T) == sizeof(X) && plan.sets == 1;
    const std::int64_t first_row = image * (tokens - 1) + first_token - 1;
    const TokenRows<T, kTf32, kHeadGroups> rows(weights);
#pragma unroll 1
    for (int j = 0; j < ring.tiles; j++) {
      float d[2][4] = {};
      rows.multiply(d, u_grad_context + (ring.first_tile + j) * 16, row_of_u_stride);
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
        if (in_place) {
          if constexpr (sizeof(T) == 2) {
            *reinterpret_cast<std::uint32_t*>(at_x) = pack<T>(g[0], g[1]);
          } else {
            *reinterpret_cast<float2*>(at_x) = make_float2(g[0], g[1]);
          }
        } else if (valid[r] && token > 0) {
          const std::int64_t index = (first_row + row8 + 8 * r) * width + column;
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
      }
    }
    if (!in_place || !a.grad_patches.data) return;
    __syncwarp();
    // A warp stores its own columns, with `lanes` lanes to a row.
    constexpr int kChunk = Chunk<T>::kSize;
    const int columns = min(ring.tiles * 16, width - ring.first_tile * 16), lanes = ring.lanes;
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
  });

  // The warp groups of the block add up in their order.
  __syncthreads();
  const int grad_u_stride = plan.columns + 4;
  float* const of_warp_groups = at.grad_u.in<float>(memory);
  float* const rests = of_warp_groups + warp_groups * kHeads * grad_u_stride;
#pragma unroll
  for (int g = 0; g < kHeadGroups; g++) {
    float* to = of_warp_groups + (group * kHeads + g * 8 + 2 * pair) * grad_u_stride + ring.first_tile * 16 + row8;
#pragma unroll
    for (int j = 0; j < kTiles<kHeadGroups>; j++) {
      if (j < ring.tiles) {
        to[j * 16] = grad_u[j][g][0], to[j * 16 + grad_u_stride] = grad_u[j][g][1];
        to[j * 16 + 8] = grad_u[j][g][2], to[j * 16 + grad_u_stride + 8] = grad_u[j][g][3];
      }
    }
    rest[g] += __shfl_xor_sync(~0u, rest[g], 1);
    rest[g] += __shfl_xor_sync(~0u, rest[g], 2);
    if (ring.part == 0 && pair == 0) rests[group * kHeads + g * 8 + row8] = rest[g];
  }
  __syncthreads();
  const std::int64_t row = (image * plan.splits + split) * heads + first_head;
  for (int h = warp; h < heads_here; h += kTokenWarps) {
    for (int c = lane; c < width; c += 32) {
      float sum = 0;
      for (int i = 0; i < warp_groups; i++) sum += of_warp_groups[(i * kHeads + h) * grad_u_stride + c];
      a.grad_u[(row + h) * width + c] = sum;
    }
    if (lane == 0) {
      float sum = 0;
      for (int i = 0; i < warp_groups; i++) sum += rests[i * kHeads + h];
      a.rest[row + h] = sum;
    }
  }
}

template <class T, class X, bool kTf32>
Error launch_gradient(const TokenGradient& args, Stream stream) {
  const auto kernel =
      args.plan.head_groups == 1 ? token_gradient_kernel<T, X, kTf32, 1> : token_gradient_kernel<T, X, kTf32, 2>;
  return launch(kernel, dim3(static_cast<unsigned>(args.tokens.batch * args.plan.splits)), kTokenThreads,
                static_cast<std::size_t>(args.plan.shared), stream, args);
}

}  // namespace

TokenPlan plan_token_gradient(const Tokens& tokens, DType dtype) {
  return plan_tokens(tokens, dtype, [&](const TokenPlan& plan) {
    const GradientMemory at(plan, dtype == DType::float32 ? 4 : 2);
    assert(in_order(at.u_grad_context, at.vectors, at.weights, at.sums, at.rings, at.exchange));
    assert(in_order(at.sums, at.grad_u));
    return at.total;
  });
}

Error token_gradient(const TokenGradient& args, Stream stream) {
  if (args.dtype == DType::float32)
    return args.tf32 ? launch_gradient<float, float, true>(args, stream)
                     : launch_gradient<float, float, false>(args, stream);
  const bool float32_tokens = args.tokens.dtype == DType::float32;
  if (args.dtype == DType::float16)
    return float32_tokens ? launch_gradient<__half, float, false>(args, stream)
                          : launch_gradient<__half, __half, false>(args, stream);
  return float32_tokens ? launch_gradient<__nv_bfloat16, float, false>(args, stream)
                        : launch_gradient<__nv_bfloat16, __nv_bfloat16, false>(args, stream);
}

}  // namespace crossvit::cuda
