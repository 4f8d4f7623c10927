// The gradients of cls_cross_attention's weights, and what is left behind all other steps: sums over the rows that they
// left, and the CLS tokens' own gradient.
#include <algorithm>

#include "cuda/cls_cross_attention_backward.h"
#include "cuda/cls_rows.cuh"
#include "cuda/launch.cuh"
#include "cuda/normalized_cls.cuh"

namespace crossvit::cuda {

namespace {

// Rows and columns of a weight's gradient in a block, and images at once.
constexpr int kGradRows = 32, kGradColumns = 64, kGradImages = 64;

template <class T, bool kTf32>
__global__ void __launch_bounds__(kRowThreads, 1) projection_gradients_kernel(const ProjectionGradients a) {
  const auto& [dtype, tf32, aligned, batch, width, heads] = a.product;
  constexpr int kLeftStride = odd_stride<T>(kGradRows), kRightStride = odd_stride<T>(kGradColumns);
  constexpr int kLeft = kGradImages * kGradRows / kRowThreads, kRight = kGradImages * kGradColumns / kRowThreads;
  T* const left = reinterpret_cast<T*>(ptx::shared_memory());
  T* const right = left + kGradImages * kLeftStride;
  const int d = width / heads, row_blocks = (d + kGradRows - 1) / kGradRows;
  const int column_blocks = (width + kGradColumns - 1) / kGradColumns;
  const int which = blockIdx.y;  // of q, k, v
  void* const out = which == 0 ? a.grad_q_weight : which == 1 ? a.grad_k_weight : a.grad_v_weight;
  if (!out) return;
  const int head = blockIdx.x / column_blocks / row_blocks;
  const int first_row = blockIdx.x / column_blocks % row_blocks * kGradRows;
  const int first_column = blockIdx.x % column_blocks * kGradColumns;
  const float scale = which == 1 ? 1 / sqrtf(static_cast<float>(d)) : 1;

  // A thread's elements: always the same row and column, of every 8th and every 4th image.
  const int j = first_row + threadIdx.x % kGradRows, c = first_column + threadIdx.x % kGradColumns;
  float gamma = 0, beta = 0;
  if (c < width) {
    gamma = load(a.norm_weight, c);
    if (which != 1 && a.norm_bias.data) beta = load(a.norm_bias, c);
  }
  float lefts[kLeft], rights[kRight];
  const auto read = [&](std::int64_t first) {
#pragma unroll
    for (int i = 0; i < kLeft; i++) {
      const std::int64_t image = first + i * (kRowThreads / kGradRows) + threadIdx.x / kGradRows;
      const std::int64_t index = image * width + head * d + j;
      lefts[i] = 0;
      if (image < batch && j < d)
        lefts[i] = which == 0   ? a.grad_query[index]
                   : which == 1 ? a.query[index] * scale
                                : to_float(static_cast<const T*>(a.grad_out)[index]);
    }
#pragma unroll
    for (int i = 0; i < kRight; i++) {
      const std::int64_t image = first + i * (kRowThreads / kGradColumns) + threadIdx.x / kGradColumns;
      rights[i] = 0;
      if (image < batch && c < width) {
        const std::int64_t index = (image * heads + head) * width + c;
        const float value = which == 0   ? normalized_cls(a.normalized_cls, image, c)
                            : which == 1 ? a.grad_u[index]
                                         : a.context[index];
        rights[i] = fmaf(value, gamma, beta);
      }
    }
  };

  const int warp = threadIdx.x / 32, row = warp / 4 * 16, column = warp % 4 * 16;
  float sum[2][4] = {};
  read(0);
  for (std::int64_t first = 0; first < batch; first += kGradImages) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kLeft; i++)
      left[(i * (kRowThreads / kGradRows) + threadIdx.x / kGradRows) * kLeftStride + threadIdx.x % kGradRows] =
          from_float<T>(lefts[i]);
#pragma unroll
    for (int i = 0; i < kRight; i++)
      right[(i * (kRowThreads / kGradColumns) + threadIdx.x / kGradColumns) * kRightStride +
            threadIdx.x % kGradColumns] = from_float<T>(rights[i]);
    __syncthreads();
    if (first + kGradImages < batch) read(first + kGradImages);
    const int depth = round_up(static_cast<int>(min(batch - first, static_cast<std::int64_t>(kGradImages))), 16);
    multiply_warp<kTf32, true, true>(sum, left + row, kLeftStride, right + column, kRightStride, depth);
  }
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int r = first_row + row + threadIdx.x % 32 / 4 + e / 2 * 8;
      const int to = first_column + column + n * 8 + threadIdx.x % 4 * 2 + e % 2;
      if (r < d && to < width)
        static_cast<T*>(out)[static_cast<std::int64_t>(head * d + r) * width + to] = from_float<T>(sum[n][e]);
    }
}

// The sum over rows of f(row, column) for 32 columns, by a block in a fixed order.
template <class F>
__device__ __forceinline__ void sum_rows(std::int64_t rows, int width, const Target& to, F&& f) {
  float* const sums = reinterpret_cast<float*>(ptx::shared_memory());
  const int c = blockIdx.x * 32 + threadIdx.x % 32;
  float sum = 0;
  if (c < width) {
#pragma unroll 4
    for (std::int64_t r = threadIdx.x / 32; r < rows; r += kRowWarps) sum += f(r, c);
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= 32 || c >= width) return;
  for (int i = 1; i < kRowWarps; i++) sum += sums[i * 32 + threadIdx.x];
  store(to, c, sum);
}

__global__ void __launch_bounds__(kRowThreads, 1) finish_gradients_kernel(const FinishGradients a) {
  const auto& [dtype, tf32, aligned, batch, width, heads] = a.product;
  const int which = blockIdx.y;
  if (which < 4 && static_cast<int>(blockIdx.x) * 32 >= width) return;
  if (which == 0) {
    if (a.grad_norm_weight.data)
      sum_rows(a.weight_rows, width, a.grad_norm_weight,
               [&](std::int64_t r, int c) { return a.parts.weight[r * width + c]; });
  } else if (which == 1) {
    if (a.grad_norm_bias.data)
      sum_rows(a.bias_rows, width, a.grad_norm_bias,
               [&](std::int64_t r, int c) { return a.parts.bias[r * width + c]; });
  } else if (which == 2) {
    if (a.grad_q_bias.data)
      sum_rows(batch, width, a.grad_q_bias, [&](std::int64_t r, int c) { return a.grad_query[r * width + c]; });
  } else if (which == 3) {
    // The probabilities sum to one, unless they are not numbers, which this must not be either, then.
    if (a.grad_v_bias.data)
      sum_rows(batch, width, a.grad_v_bias, [&](std::int64_t r, int c) {
        const float prob = a.probs[(r * heads + c / (width / heads)) * a.normalized_cls.tokens];
        return load(a.grad_out, dtype, r * width + c) + prob * 0;
      });
  } else if (a.grad_cls.data) {
    const std::int64_t image = static_cast<std::int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / 32;
    if (image >= batch) return;
    const int lane = threadIdx.x % 32;
    const auto gradient = [&](int c) {
      const float gamma = load(a.norm_weight, c);
      float of_rest = 0;
      for (int h = 0; h < heads; h++) {
        float rest = 0;
        for (int s = 0; s < a.splits; s++) rest += a.rest[(image * a.splits + s) * heads + h];
        const float share = rest * a.probs[(image * heads + h) * a.normalized_cls.tokens];
        of_rest = fmaf(share, a.key_query[(image * heads + h) * width + c] * gamma, of_rest);
      }
      return (a.grad_normalized[image * width + c] - of_rest) + a.grad_query_input[image * width + c] * gamma;
    };
    float one = 0, along = 0;
    for (int c = lane; c < width; c += 32) {
      const float g = gradient(c);
      one += g;
      along = fmaf(g, normalized_cls(a.normalized_cls, image, c), along);
    }
    one = sum_lanes<32>(one) / width, along = sum_lanes<32>(along) / width;
    const float rstd = a.normalized_cls.rstd[image * a.normalized_cls.tokens];
    for (int c = lane; c < width; c += 32)
      store(a.grad_cls, image * width + c,
            rstd * ((gradient(c) - one) - normalized_cls(a.normalized_cls, image, c) * along));
  }
}

}  // namespace

Error projection_gradients(const ProjectionGradients& args, Stream stream) {
  return with_math(args.product.dtype, args.product.tf32, [&]<class T, bool kTf32>() {
    const int d = args.product.width / args.product.heads;
    const unsigned blocks = args.product.heads * ((d + kGradRows - 1) / kGradRows) *
                            ((args.product.width + kGradColumns - 1) / kGradColumns);
    const std::size_t shared = kGradImages * (odd_stride<T>(kGradRows) + odd_stride<T>(kGradColumns)) * sizeof(T);
    return launch(projection_gradients_kernel<T, kTf32>, dim3(blocks, 3), kRowThreads, shared, stream, args);
  });
}

Error finish_gradients(const FinishGradients& args, Stream stream) {
  const std::int64_t columns = (args.product.width + 31) / 32,
                     images = args.grad_cls.data ? (args.product.batch + kRowWarps - 1) / kRowWarps : 0;
  return launch(finish_gradients_kernel, dim3(static_cast<unsigned>(std::max(columns, images)), 5), kRowThreads,
                kRowThreads * sizeof(float), stream, args);
}

}  // namespace crossvit::cuda
