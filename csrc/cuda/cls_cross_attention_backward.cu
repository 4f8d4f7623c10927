// cls_cross_attention's gradient before and after the pass over the tokens, 16 images to a block.
#include "cuda/cls_cross_attention_backward.h"

#include "cuda/cls_rows.cuh"
#include "cuda/launch.cuh"
#include "cuda/normalized_cls.cuh"

namespace crossvit::cuda {

namespace {

template <class T, bool kTf32>
__global__ void __launch_bounds__(kRowThreads, 1) value_gradient_kernel(const ValueGradient a, const int tile_columns) {
  const auto& [dtype, tf32, aligned, batch, width, heads] = a.product;
  const Place at(heads, batch);
  const int lane = threadIdx.x % 32, d = width / heads, padded_d = round_up(d, 16), columns = round_up(width, 16);
  const int out_stride = odd_stride<T>(padded_d), v_stride = odd_stride<T>(tile_columns),
            grad_value_stride = columns + 4;
  float* const grad_value = reinterpret_cast<float*>(ptx::shared_memory());
  T* const out = reinterpret_cast<T*>(grad_value + kImages * grad_value_stride);
  T* const buffers = out + kImages * out_stride;

  const MatrixView weight{a.v_weight, width, aligned};
  const auto fill = [&](int step, int stage) {
    const int c = step * tile_columns;
    fill_tile(buffers + stage * padded_d * v_stride, v_stride, weight, at.part * d, d, c, min(width - c, tile_columns));
  };
  const auto load_rows = [&] {
    for (int r = threadIdx.x / 32; r < kImages; r += kRowWarps) {
      const T* from = static_cast<const T*>(a.grad_out) + (at.image + r) * width + at.part * d;
      for (int j = lane; j < padded_d; j += 32)
        out[r * out_stride + j] = r < at.rows && j < d ? from[j] : from_float<T>(0);
    }
  };
  stream_tiles((width + tile_columns - 1) / tile_columns, 2, fill, load_rows, [&](int step, int stage) {
    const int first = step * tile_columns;
    rows_by_columns<kTf32>(out, out_stride, 1, buffers + stage * padded_d * v_stride, v_stride,
                           round_up(min(width - first, tile_columns), 16), padded_d,
                           [&](int row, int column, float v0, float v1) {
                             grad_value[row * grad_value_stride + first + column] = v0;
                             grad_value[row * grad_value_stride + first + column + 1] = v1;
                           });
  });

  for (int r = threadIdx.x / 32; r < at.rows; r += kRowWarps) {
    const std::int64_t row = (at.image + r) * heads + at.part;
    T* const u_grad_context = static_cast<T*>(a.u_grad_context) + row * 2 * width;
    float sum_u = 0, sum_dz = 0, delta = 0;
#pragma unroll 4
    for (int c = lane; c < width; c += 32) {
      const float gamma = load(a.norm_weight, c);
      const T u = from_float<T>(a.key_query[row * width + c] * gamma);
      const T dz = from_float<T>(grad_value[r * grad_value_stride + c] * gamma);
      u_grad_context[c] = u;
      u_grad_context[width + c] = dz;
      sum_u += to_float(u);
      sum_dz += to_float(dz);
      delta = fmaf(to_float(dz), a.context[row * width + c], delta);
    }
    sum_u = sum_lanes<32>(sum_u), sum_dz = sum_lanes<32>(sum_dz), delta = sum_lanes<32>(delta);
    if (lane == 0) {
      a.delta[row] = delta;
      a.row_means[row * 2] = sum_u / width;
      a.row_means[row * 2 + 1] = sum_dz / width;
    }
  }
  for (int c = threadIdx.x; c < width; c += kRowThreads) {
    float along = 0, sum = 0;
#pragma unroll 4
    for (int r = 0; r < at.rows; r++) {
      const float value = grad_value[r * grad_value_stride + c];
      sum += value;
      if (a.parts.weight) along = fmaf(value, a.context[((at.image + r) * heads + at.part) * width + c], along);
    }
    if (a.parts.weight) a.parts.weight[static_cast<std::int64_t>(blockIdx.x) * width + c] = along;
    if (a.parts.bias) a.parts.bias[static_cast<std::int64_t>(blockIdx.x) * width + c] = sum;
  }
}

template <class T, bool kTf32>
__global__ void __launch_bounds__(kRowThreads, 1) query_gradient_kernel(const QueryGradient a, const int tile_rows) {
  const auto& [dtype, tf32, aligned, batch, width, heads] = a.product;
  const Place at(heads, batch);
  const int d = width / heads, columns = round_up(width, 16), stride = odd_stride<T>(columns);
  T* const gamma_grad_u = reinterpret_cast<T*>(ptx::shared_memory());
  T* const buffers = gamma_grad_u + kImages * stride;
  float* const rest_of_rows = reinterpret_cast<float*>(buffers + 2 * tile_rows * stride);
  const float scale = 1 / sqrtf(static_cast<float>(d));

  const MatrixView weight{a.k_weight, width, aligned};
  const auto fill = [&](int step, int stage) {
    const int j = step * tile_rows;
    fill_tile(buffers + stage * tile_rows * stride, stride, weight, at.part * d + j, min(d - j, tile_rows), 0, width);
  };
  const auto join = [&] {
    if (static_cast<int>(threadIdx.x) < at.rows) {
      float rest = 0;
      for (int s = 0; s < a.splits; s++) rest += a.rest[((at.image + threadIdx.x) * a.splits + s) * heads + at.part];
      rest_of_rows[threadIdx.x] = rest;
    }
    __syncthreads();
    for (int c = threadIdx.x; c < columns; c += kRowThreads) {
      float along = 0;
#pragma unroll 4
      for (int r = 0; r < kImages; r++) {
        float value = 0;
        if (r < at.rows && c < width) {
          const float* from = a.grad_u_of_splits + ((at.image + r) * a.splits * heads + at.part) * width + c;
          const std::int64_t row = ((at.image + r) * heads + at.part) * width + c;
          const float z = a.context[row], key_query = a.parts.weight ? a.key_query[row] : 0;
          float sum = 0;
          for (int s = 0; s < a.splits; s++) sum += from[static_cast<std::int64_t>(s) * heads * width];
          sum -= rest_of_rows[r] * z;
          a.grad_u[row] = sum;
          along = fmaf(sum, key_query, along);
          value = sum * load(a.norm_weight, c);
        }
        gamma_grad_u[r * stride + c] = from_float<T>(value);
      }
      if (a.parts.weight && c < width) a.parts.weight[static_cast<std::int64_t>(blockIdx.x) * width + c] = along;
    }
  };
  stream_tiles((d + tile_rows - 1) / tile_rows, 2, fill, join, [&](int step, int stage) {
    const int first = step * tile_rows;
    rows_by_rows<kTf32>(gamma_grad_u, stride, buffers + stage * tile_rows * stride, stride,
                        min(round_up(d, 16) - first, tile_rows), columns, [&](int row, int column, float v) {
                          const int j = first + column;
                          if (row < at.rows && j < d)
                            a.grad_query[(at.image + row) * width + at.part * d + j] = v * scale;
                        });
  });
}

constexpr int kInputColumns = kRowWarps * 16, kInputDepth = 64;

template <class T, bool kTf32>
__global__ void __launch_bounds__(kRowThreads, 1) query_input_gradient_kernel(const QueryInputGradient a) {
  const auto& [dtype, tf32, aligned, batch, width, heads] = a.product;
  const Place at((width + kInputColumns - 1) / kInputColumns, batch);
  const auto [tile, rows, image] = at;
  const std::int64_t part = image / kImages;
  const int first = tile * kInputColumns;
  const int lane = threadIdx.x % 32, padded = round_up(width, kInputDepth), stride = odd_stride<T>(padded);
  constexpr int kStride = odd_stride<T>(kInputColumns);
  T* const dq = reinterpret_cast<T*>(ptx::shared_memory());
  T* const buffers = dq + kImages * stride;

  const MatrixView weight{a.q_weight, width, aligned};
  const int columns = min(width - first, kInputColumns);
  const auto fill = [&](int step, int stage) {
    const int j = step * kInputDepth;
    fill_tile(buffers + stage * kInputDepth * kStride, kStride, weight, j, min(width - j, kInputDepth), first, columns);
  };
  const auto load_rows = [&] {
    for (int r = threadIdx.x / 32; r < kImages; r += kRowWarps)
      for (int j = lane; j < padded; j += 32)
        dq[r * stride + j] = from_float<T>(r < rows && j < width ? a.grad_query[(image + r) * width + j] : 0);
  };
  const int mine = threadIdx.x / 32 * 16;
  float d[2][4] = {};
  stream_tiles((width + kInputDepth - 1) / kInputDepth, 2, fill, load_rows, [&](int step, int stage) {
    const int depth = round_up(min(width - step * kInputDepth, kInputDepth), 16);
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
        if (r >= rows || c >= width) continue;
        const float value = d[j][2 * i + q];
        a.grad_query_input[(image + r) * width + c] = value;
        sum += value;
        if (a.parts.weight) along = fmaf(value, normalized_cls(a.normalized_cls, image + r, c), along);
      }
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        along += __shfl_xor_sync(~0u, along, distance);
        sum += __shfl_xor_sync(~0u, sum, distance);
      }
      if (lane >= 4 || c >= width) continue;
      if (a.parts.weight) a.parts.weight[part * width + c] = along;
      if (a.parts.bias) a.parts.bias[part * width + c] = sum;
    }
}

}  // namespace

Error value_gradient(const ValueGradient& args, Stream stream) {
  return with_math(args.product.dtype, args.product.tf32, [&]<class T, bool kTf32>() {
    const int d = round_up(args.product.width / args.product.heads, 16), columns = round_up(args.product.width, 16);
    const std::int64_t fixed = kImages * ((columns + 4) * 4 + odd_stride<T>(d) * static_cast<int>(sizeof(T)));
    const int tile = tile_size(columns, d * sizeof(T), (kSharedMemory - fixed) / 2 - 16 * d);
    return launch(value_gradient_kernel<T, kTf32>, blocks_of(args.product.batch) * args.product.heads, kRowThreads,
                  fixed + 2 * d * odd_stride<T>(tile) * sizeof(T), stream, args, tile);
  });
}

Error query_gradient(const QueryGradient& args, Stream stream) {
  return with_math(args.product.dtype, args.product.tf32, [&]<class T, bool kTf32>() {
    const std::int64_t row = odd_stride<T>(round_up(args.product.width, 16)) * sizeof(T), fixed = kImages * (row + 4);
    const int tile = tile_size(args.product.width / args.product.heads, row, (kSharedMemory - fixed) / 2);
    return launch(query_gradient_kernel<T, kTf32>, blocks_of(args.product.batch) * args.product.heads, kRowThreads,
                  fixed + 2 * tile * row, stream, args, tile);
  });
}

Error query_input_gradient(const QueryInputGradient& args, Stream stream) {
  return with_math(args.product.dtype, args.product.tf32, [&]<class T, bool kTf32>() {
    const std::int64_t shared = (kImages * odd_stride<T>(round_up(args.product.width, kInputDepth)) +
                                 2 * kInputDepth * odd_stride<T>(kInputColumns)) *
                                sizeof(T);
    return launch(query_input_gradient_kernel<T, kTf32>,
                  blocks_of(args.product.batch) * divide_up(args.product.width, kInputColumns), kRowThreads, shared,
                  stream, args);
  });
}

}  // namespace crossvit::cuda
