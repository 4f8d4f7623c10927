// cls_cross_attention's gradient before and after the pass over the tokens, 16 images to a block.
#include "cuda/cls_gradients.h"

#include "cuda/cls_rows.cuh"
#include "cuda/launch.cuh"

namespace crossvit::cuda {

namespace {

// The images of a block and its head.
struct Place {
  int head, rows;
  std::int64_t image, part;
  __device__ __forceinline__ Place(int heads, std::int64_t batch)
      : head(blockIdx.x % heads), image(static_cast<std::int64_t>(blockIdx.x / heads) * kImages), part(blockIdx.x) {
    rows = static_cast<int>(min(batch - image, static_cast<std::int64_t>(kImages)));
  }
};

__device__ __forceinline__ float sum_warp(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

__device__ __forceinline__ float first_token(const FirstTokens& first, std::int64_t image, int c) {
  const float x = load(first.cls, first.type, image * first.stride + c);
  return (x - first.mean[image * first.tokens]) * first.rstd[image * first.tokens];
}

template <class T, bool kTf32>
__global__ void __launch_bounds__(kRowThreads, 1) value_gradient_kernel(const ValueGradient a, const int tile_columns) {
  const Place at(a.heads, a.batch);
  const int lane = threadIdx.x % 32, d = a.width / a.heads, padded_d = round_up(d, 16), columns = round_up(a.width, 16);
  const int out_stride = odd_stride<T>(padded_d), v_stride = odd_stride<T>(tile_columns), g_stride = columns + 4;
  float* const g = reinterpret_cast<float*>(ptx::shared_memory());
  T* const out = reinterpret_cast<T*>(g + kImages * g_stride);
  T* const buffers = out + kImages * out_stride;

  const MatrixView weight{a.v_weight, a.width, a.aligned};
  const auto fill = [&](int step, int stage) {
    const int c = step * tile_columns;
    fill_tile(buffers + stage * padded_d * v_stride, v_stride, weight, at.head * d, d, c,
              min(a.width - c, tile_columns));
  };
  const auto load_rows = [&] {
    for (int r = threadIdx.x / 32; r < kImages; r += kRowWarps) {
      const T* from = static_cast<const T*>(a.grad_out) + (at.image + r) * a.width + at.head * d;
      for (int j = lane; j < padded_d; j += 32)
        out[r * out_stride + j] = r < at.rows && j < d ? from[j] : from_float<T>(0);
    }
  };
  stream_tiles((a.width + tile_columns - 1) / tile_columns, 2, fill, load_rows, [&](int step, int stage) {
    const int first = step * tile_columns;
    rows_by_columns<kTf32>(out, out_stride, 1, buffers + stage * padded_d * v_stride, v_stride,
                           round_up(min(a.width - first, tile_columns), 16), padded_d,
                           [&](int row, int column, float v0, float v1) {
                             g[row * g_stride + first + column] = v0;
                             g[row * g_stride + first + column + 1] = v1;
                           });
  });

  for (int r = threadIdx.x / 32; r < at.rows; r += kRowWarps) {
    const std::int64_t row = (at.image + r) * a.heads + at.head;
    T* const pairs = static_cast<T*>(a.pairs) + row * 2 * a.width;
    float sum_u = 0, sum_dz = 0, delta = 0;
#pragma unroll 4
    for (int c = lane; c < a.width; c += 32) {
      const float gamma = load(a.norm_weight.data, a.norm_weight.type, c);
      const T u = from_float<T>(a.key_query[row * a.width + c] * gamma);
      const T dz = from_float<T>(g[r * g_stride + c] * gamma);
      pairs[c] = u;
      pairs[a.width + c] = dz;
      sum_u += to_float(u);
      sum_dz += to_float(dz);
      delta = fmaf(to_float(dz), a.context[row * a.width + c], delta);
    }
    sum_u = sum_warp(sum_u), sum_dz = sum_warp(sum_dz), delta = sum_warp(delta);
    if (lane == 0) {
      a.delta[row] = delta;
      a.means[row * 2] = sum_u / a.width;
      a.means[row * 2 + 1] = sum_dz / a.width;
    }
  }
  for (int c = threadIdx.x; c < a.width; c += kRowThreads) {
    float along = 0, sum = 0;
#pragma unroll 4
    for (int r = 0; r < at.rows; r++) {
      const float value = g[r * g_stride + c];
      sum += value;
      if (a.parts.weight) along = fmaf(value, a.context[((at.image + r) * a.heads + at.head) * a.width + c], along);
    }
    if (a.parts.weight) a.parts.weight[at.part * a.width + c] = along;
    if (a.parts.bias) a.parts.bias[at.part * a.width + c] = sum;
  }
}

template <class T, bool kTf32>
__global__ void __launch_bounds__(kRowThreads, 1) query_gradient_kernel(const QueryGradient a, const int tile_rows) {
  const Place at(a.heads, a.batch);
  const int d = a.width / a.heads, columns = round_up(a.width, 16), stride = odd_stride<T>(columns);
  T* const t = reinterpret_cast<T*>(ptx::shared_memory());
  T* const buffers = t + kImages * stride;
  float* const rests = reinterpret_cast<float*>(buffers + 2 * tile_rows * stride);
  const float scale = 1 / sqrtf(static_cast<float>(d));

  const MatrixView weight{a.k_weight, a.width, a.aligned};
  const auto fill = [&](int step, int stage) {
    const int j = step * tile_rows;
    fill_tile(buffers + stage * tile_rows * stride, stride, weight, at.head * d + j, min(d - j, tile_rows), 0, a.width);
  };
  const auto join = [&] {
    if (static_cast<int>(threadIdx.x) < at.rows) {
      float rest = 0;
      for (int s = 0; s < a.splits; s++) rest += a.rests[((at.image + threadIdx.x) * a.splits + s) * a.heads + at.head];
      rests[threadIdx.x] = rest;
    }
    __syncthreads();
    for (int c = threadIdx.x; c < columns; c += kRowThreads) {
      float along = 0;
#pragma unroll 4
      for (int r = 0; r < kImages; r++) {
        float value = 0;
        if (r < at.rows && c < a.width) {
          const float* from = a.partial + ((at.image + r) * a.splits * a.heads + at.head) * a.width + c;
          const std::int64_t row = ((at.image + r) * a.heads + at.head) * a.width + c;
          const float z = a.context[row], key_query = a.parts.weight ? a.key_query[row] : 0;
          float sum = 0;
          for (int s = 0; s < a.splits; s++) sum += from[static_cast<std::int64_t>(s) * a.heads * a.width];
          sum -= rests[r] * z;
          a.sums[row] = sum;
          along = fmaf(sum, key_query, along);
          value = sum * load(a.norm_weight.data, a.norm_weight.type, c);
        }
        t[r * stride + c] = from_float<T>(value);
      }
      if (a.parts.weight && c < a.width) a.parts.weight[at.part * a.width + c] = along;
    }
  };
  stream_tiles((d + tile_rows - 1) / tile_rows, 2, fill, join, [&](int step, int stage) {
    const int first = step * tile_rows;
    rows_by_rows<kTf32>(t, stride, buffers + stage * tile_rows * stride, stride,
                        min(round_up(d, 16) - first, tile_rows), columns, [&](int row, int column, float v0, float v1) {
                          const int j = first + column;
                          float* to = a.grad_query + (at.image + row) * a.width + at.head * d + j;
                          if (row < at.rows && j < d) to[0] = v0 * scale;
                          if (row < at.rows && j + 1 < d) to[1] = v1 * scale;
                        });
  });
}

constexpr int kInputColumns = kRowWarps * 16, kInputDepth = 64;

template <class T, bool kTf32>
__global__ void __launch_bounds__(kRowThreads, 1) query_input_gradient_kernel(const QueryInputGradient a) {
  const int tiles = (a.width + kInputColumns - 1) / kInputColumns;
  const std::int64_t part = blockIdx.x / tiles, image = part * kImages;
  const int first = blockIdx.x % tiles * kInputColumns;
  const int rows = static_cast<int>(min(a.batch - image, static_cast<std::int64_t>(kImages)));
  const int lane = threadIdx.x % 32, padded = round_up(a.width, kInputDepth), stride = odd_stride<T>(padded);
  constexpr int kStride = odd_stride<T>(kInputColumns);
  T* const dq = reinterpret_cast<T*>(ptx::shared_memory());
  T* const buffers = dq + kImages * stride;

  const MatrixView weight{a.q_weight, a.width, a.aligned};
  const int columns = min(a.width - first, kInputColumns);
  const auto fill = [&](int step, int stage) {
    const int j = step * kInputDepth;
    fill_tile(buffers + stage * kInputDepth * kStride, kStride, weight, j, min(a.width - j, kInputDepth), first,
              columns);
  };
  const auto load_rows = [&] {
    for (int r = threadIdx.x / 32; r < kImages; r += kRowWarps)
      for (int j = lane; j < padded; j += 32)
        dq[r * stride + j] = from_float<T>(r < rows && j < a.width ? a.grad_query[(image + r) * a.width + j] : 0);
  };
  const int mine = threadIdx.x / 32 * 16;
  float d[2][4] = {};
  stream_tiles((a.width + kInputDepth - 1) / kInputDepth, 2, fill, load_rows, [&](int step, int stage) {
    const int depth = round_up(min(a.width - step * kInputDepth, kInputDepth), 16);
    if (mine < columns)
      multiply_warp<kTf32, false, true>(d, dq + step * kInputDepth, stride,
                                        buffers + stage * kInputDepth * kStride + mine, kStride, depth);
  });
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int q = 0; q < 2; q++) {
      const int c = first + mine + j * 8 + lane % 4 * 2 + q;
      float along = 0, sum = 0;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int r = lane / 4 + 8 * i;
        if (r >= rows || c >= a.width) continue;
        const float value = d[j][2 * i + q];
        a.grad_input[(image + r) * a.width + c] = value;
        sum += value;
        if (a.parts.weight) along = fmaf(value, first_token(a.first, image + r, c), along);
      }
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        along += __shfl_xor_sync(~0u, along, distance);
        sum += __shfl_xor_sync(~0u, sum, distance);
      }
      if (lane >= 4 || c >= a.width) continue;
      if (a.parts.weight) a.parts.weight[part * a.width + c] = along;
      if (a.parts.bias) a.parts.bias[part * a.width + c] = sum;
    }
}

// Rows and columns of a weight's gradient in a block, and images at once.
constexpr int kGradRows = 32, kGradColumns = 64, kGradImages = 64;

template <class T, bool kTf32>
__global__ void __launch_bounds__(kRowThreads, 1) weight_gradients_kernel(const WeightGradients a) {
  constexpr int kLeftStride = odd_stride<T>(kGradRows), kWideStride = odd_stride<T>(kGradColumns);
  constexpr int kLeft = kGradImages * kGradRows / kRowThreads, kWide = kGradImages * kGradColumns / kRowThreads;
  T* const left = reinterpret_cast<T*>(ptx::shared_memory());
  T* const wide = left + kGradImages * kLeftStride;
  const int d = a.width / a.heads, row_blocks = (d + kGradRows - 1) / kGradRows;
  const int column_blocks = (a.width + kGradColumns - 1) / kGradColumns;
  const int which = blockIdx.y;  // of q, k, v
  void* const out = which == 0 ? a.q_weight : which == 1 ? a.k_weight : a.v_weight;
  if (!out) return;
  const int head = blockIdx.x / column_blocks / row_blocks;
  const int first_row = blockIdx.x / column_blocks % row_blocks * kGradRows;
  const int first_column = blockIdx.x % column_blocks * kGradColumns;
  const float scale = which == 1 ? 1 / sqrtf(static_cast<float>(d)) : 1;

  // A thread's elements: always the same row and column, of every 8th and every 4th image.
  const int j = first_row + threadIdx.x % kGradRows, c = first_column + threadIdx.x % kGradColumns;
  float gamma = 0, beta = 0;
  if (c < a.width) {
    gamma = load(a.norm_weight.data, a.norm_weight.type, c);
    if (which != 1 && a.norm_bias.data) beta = load(a.norm_bias.data, a.norm_bias.type, c);
  }
  float lefts[kLeft], wides[kWide];
  const auto read = [&](std::int64_t first) {
#pragma unroll
    for (int i = 0; i < kLeft; i++) {
      const std::int64_t image = first + i * (kRowThreads / kGradRows) + threadIdx.x / kGradRows;
      const std::int64_t index = image * a.width + head * d + j;
      lefts[i] = 0;
      if (image < a.batch && j < d)
        lefts[i] = which == 0   ? a.grad_query[index]
                   : which == 1 ? a.query[index] * scale
                                : to_float(static_cast<const T*>(a.grad_out)[index]);
    }
#pragma unroll
    for (int i = 0; i < kWide; i++) {
      const std::int64_t image = first + i * (kRowThreads / kGradColumns) + threadIdx.x / kGradColumns;
      wides[i] = 0;
      if (image < a.batch && c < a.width) {
        const std::int64_t index = (image * a.heads + head) * a.width + c;
        const float value = which == 0 ? first_token(a.first, image, c) : which == 1 ? a.sums[index] : a.context[index];
        wides[i] = fmaf(value, gamma, beta);
      }
    }
  };

  const int warp = threadIdx.x / 32, row = warp / 4 * 16, column = warp % 4 * 16;
  float sum[2][4] = {};
  read(0);
  for (std::int64_t first = 0; first < a.batch; first += kGradImages) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kLeft; i++)
      left[(i * (kRowThreads / kGradRows) + threadIdx.x / kGradRows) * kLeftStride + threadIdx.x % kGradRows] =
          from_float<T>(lefts[i]);
#pragma unroll
    for (int i = 0; i < kWide; i++)
      wide[(i * (kRowThreads / kGradColumns) + threadIdx.x / kGradColumns) * kWideStride + threadIdx.x % kGradColumns] =
          from_float<T>(wides[i]);
    __syncthreads();
    if (first + kGradImages < a.batch) read(first + kGradImages);
    const int depth = round_up(static_cast<int>(min(a.batch - first, static_cast<std::int64_t>(kGradImages))), 16);
    multiply_warp<kTf32, true, true>(sum, left + row, kLeftStride, wide + column, kWideStride, depth);
  }
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int r = first_row + row + threadIdx.x % 32 / 4 + e / 2 * 8;
      const int to = first_column + column + n * 8 + threadIdx.x % 4 * 2 + e % 2;
      if (r < d && to < a.width)
        static_cast<T*>(out)[static_cast<std::int64_t>(head * d + r) * a.width + to] = from_float<T>(sum[n][e]);
    }
}

// The sum over rows of f(row, column) for 32 columns, by a block in a fixed order.
template <class F>
__device__ __forceinline__ void sum_rows(std::int64_t rows, int width, void* out, Type type, F&& f) {
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
  store(out, type, c, sum);
}

__global__ void __launch_bounds__(kRowThreads, 1) finish_gradients_kernel(const FinishGradients a) {
  const int which = blockIdx.y, width = a.width;
  if (which < 4 && static_cast<int>(blockIdx.x) * 32 >= width) return;
  if (which == 0) {
    if (a.norm_weight_out)
      sum_rows(a.weight_rows, width, a.norm_weight_out, a.norm_weight_type,
               [&](std::int64_t r, int c) { return a.parts.weight[r * width + c]; });
  } else if (which == 1) {
    if (a.norm_bias_out)
      sum_rows(a.bias_rows, width, a.norm_bias_out, a.norm_bias_type,
               [&](std::int64_t r, int c) { return a.parts.bias[r * width + c]; });
  } else if (which == 2) {
    if (a.q_bias)
      sum_rows(a.batch, width, a.q_bias, a.q_bias_type,
               [&](std::int64_t r, int c) { return a.grad_query[r * width + c]; });
  } else if (which == 3) {
    // The probabilities sum to one, unless they are not numbers, which this must not be either, then.
    if (a.v_bias)
      sum_rows(a.batch, width, a.v_bias, a.v_bias_type, [&](std::int64_t r, int c) {
        const float prob = a.probs[(r * a.heads + c / (width / a.heads)) * a.first.tokens];
        return load(a.grad_out, a.type, r * width + c) + prob * 0;
      });
  } else if (a.cls) {
    const std::int64_t image = static_cast<std::int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / 32;
    if (image >= a.batch) return;
    const int lane = threadIdx.x % 32;
    const auto gradient = [&](int c) {
      const float gamma = load(a.norm_weight.data, a.norm_weight.type, c);
      float of_rest = 0;
      for (int h = 0; h < a.heads; h++) {
        float rest = 0;
        for (int s = 0; s < a.splits; s++) rest += a.rests[(image * a.splits + s) * a.heads + h];
        const float share = rest * a.probs[(image * a.heads + h) * a.first.tokens];
        of_rest = fmaf(share, a.key_query[(image * a.heads + h) * width + c] * gamma, of_rest);
      }
      return (a.grad_normalized[image * width + c] - of_rest) + a.grad_input[image * width + c] * gamma;
    };
    float one = 0, along = 0;
    for (int c = lane; c < width; c += 32) {
      const float g = gradient(c);
      one += g;
      along = fmaf(g, first_token(a.first, image, c), along);
    }
    one = sum_warp(one) / width, along = sum_warp(along) / width;
    const float rstd = a.first.rstd[image * a.first.tokens];
    for (int c = lane; c < width; c += 32)
      store(a.cls, a.cls_type, image * width + c,
            rstd * ((gradient(c) - one) - first_token(a.first, image, c) * along));
  }
}

unsigned blocks_of(std::int64_t batch) { return static_cast<unsigned>((batch + kImages - 1) / kImages); }

}  // namespace

Error value_gradient(const ValueGradient& args, Stream stream) {
  return with_math(args.type, args.tf32, [&]<class T, bool kTf32>() {
    const int d = round_up(args.width / args.heads, 16), columns = round_up(args.width, 16);
    const std::int64_t fixed = kImages * ((columns + 4) * 4 + odd_stride<T>(d) * static_cast<int>(sizeof(T)));
    const int tile = tile_size(columns, d * sizeof(T), (kSharedMemory - fixed) / 2 - 16 * d);
    return launch(value_gradient_kernel<T, kTf32>, dim3(blocks_of(args.batch) * args.heads), kRowThreads,
                  fixed + 2 * d * odd_stride<T>(tile) * sizeof(T), stream, args, tile);
  });
}

Error query_gradient(const QueryGradient& args, Stream stream) {
  return with_math(args.type, args.tf32, [&]<class T, bool kTf32>() {
    const std::int64_t row = odd_stride<T>(round_up(args.width, 16)) * sizeof(T), fixed = kImages * (row + 4);
    const int tile = tile_size(args.width / args.heads, row, (kSharedMemory - fixed) / 2);
    return launch(query_gradient_kernel<T, kTf32>, dim3(blocks_of(args.batch) * args.heads), kRowThreads,
                  fixed + 2 * tile * row, stream, args, tile);
  });
}

Error query_input_gradient(const QueryInputGradient& args, Stream stream) {
  return with_math(args.type, args.tf32, [&]<class T, bool kTf32>() {
    const std::int64_t shared =
        (kImages * odd_stride<T>(round_up(args.width, kInputDepth)) + 2 * kInputDepth * odd_stride<T>(kInputColumns)) *
        sizeof(T);
    return launch(query_input_gradient_kernel<T, kTf32>,
                  dim3(blocks_of(args.batch) * ((args.width + kInputColumns - 1) / kInputColumns)), kRowThreads, shared,
                  stream, args);
  });
}

Error weight_gradients(const WeightGradients& args, Stream stream) {
  return with_math(args.type, args.tf32, [&]<class T, bool kTf32>() {
    const int d = args.width / args.heads;
    const unsigned blocks =
        args.heads * ((d + kGradRows - 1) / kGradRows) * ((args.width + kGradColumns - 1) / kGradColumns);
    const std::size_t shared = kGradImages * (odd_stride<T>(kGradRows) + odd_stride<T>(kGradColumns)) * sizeof(T);
    return launch(weight_gradients_kernel<T, kTf32>, dim3(blocks, 3), kRowThreads, shared, stream, args);
  });
}

Error finish_gradients(const FinishGradients& args, Stream stream) {
  const std::int64_t columns = (args.width + 31) / 32, images = args.cls ? (args.batch + kRowWarps - 1) / kRowWarps : 0;
  return launch(finish_gradients_kernel, dim3(static_cast<unsigned>(std::max(columns, images)), 5), kRowThreads,
                kRowThreads * sizeof(float), stream, args);
}

}  // namespace crossvit::cuda
