// Backward of LayerNorm and of a gelu behind it: a warp a row, whose lanes keep their columns from row to row, so that the
// sums for weight and bias stay in registers.
#include <algorithm>
#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/layer_norm_linear.h"
#include "cuda/math.cuh"
#include "cuda/matrix_sum.h"
#include "cuda/quad.cuh"

namespace crossvit::cuda {
namespace normalized_rows {

constexpr int kWarps = 4;
constexpr int kWidest = 768;  // wider rows do not stay in registers, nor do their sums

struct Normalized {
  Quad x, grad;  // (x - mean) rstd, and the gradient of what LayerNorm's weight and bias make of it
};

// What a lane has of a row: elements [column, column + 4). LayerNorm's weight and bias are at affine and affine + width.
template <class T, class X>
struct Row {
  const LayerNormBackwardArgs& p;
  const X* x;
  const T* grad;
  T* y;  // or null
  float mean, rstd;

  __device__ __forceinline__ Normalized load(int column, const Quad& weight, const Quad& bias) const {
    Normalized result;
    const Four<X> x4 = load_four(x, column, p.width, p.x.aligned);
    const Four<T> grad4 = load_four(grad, column, p.width, p.grad.aligned);
    Quad activated;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const bool inside = column + e < p.width;
      result.x.at[e] = inside ? (to_float(x4.at[e]) - mean) * rstd : 0.0f;
      result.grad.at[e] = to_float(grad4.at[e]);
      const float value = fmaf(result.x.at[e], weight.at[e], bias.at[e]);
      activated.at[e] = p.gelu ? gelu<T>(value) : value;
      if (p.gelu && inside) result.grad.at[e] *= gelu_derivative<T>(value);
    }
    if (y) store_four(y, column, p.width, p.y.aligned, activated);
    return result;
  }
};

__device__ __forceinline__ Quad affine_quad(const Vector& vector, int column, int width) {
  Quad quad;
#pragma unroll
  for (int e = 0; e < 4; e++) {
    quad.at[e] = vector.data && column + e < width ? load(vector, column + e) : 0.0f;
  }
  return quad;
}

template <class T, class X>
__device__ __forceinline__ Row<T, X> open_row(const LayerNormBackwardArgs& p, std::int64_t row) {
  return {p,
          row_of<const X>(p.x, row),
          row_of<const T>(p.grad, row),
          p.y.data ? row_of<T>(p.y, row) : nullptr,
          p.mean[row],
          p.rstd[row]};
}

template <class X>
__device__ __forceinline__ void store_gradient(const LayerNormBackwardArgs& p, std::int64_t row, int column,
                                               const Normalized& v, const Quad& weight, float along, float total,
                                               float rstd) {
  Quad result;
#pragma unroll
  for (int e = 0; e < 4; e++) result.at[e] = (v.grad.at[e] * weight.at[e] - v.x.at[e] * along - total) * rstd;
  if (p.add.data) {
    const Quad add = to_quad(load_four(row_of<const X>(p.add, row), column, p.width, p.add.aligned));
#pragma unroll
    for (int e = 0; e < 4; e++) result.at[e] += add.at[e];
  }
  store_four(row_of<X>(p.grad_x, row), column, p.width, p.grad_x.aligned, result);
}

// Rows of at most 128 * kQuads elements.
template <class T, class X, int kQuads>
__global__ void __launch_bounds__(kWarps * 32) held_kernel(const LayerNormBackwardArgs p) {
  float* affine = reinterpret_cast<float*>(ptx::shared_memory());  // weight and bias; then the block's sums
  const int width4 = (p.width + 3) / 4 * 4;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int c = threadIdx.x; c < width4; c += kWarps * 32) {
    const bool inside = c < p.width;
    affine[c] = inside ? load(p.norm.weight, c) : 0.0f;
    affine[width4 + c] = inside ? load_or_zero(p.norm.bias, c) : 0.0f;
  }
  __syncthreads();
  Quad weight_sum[kQuads] = {}, bias_sum[kQuads] = {};
  for (std::int64_t r = static_cast<std::int64_t>(blockIdx.x) * kWarps + warp; r < p.rows;
       r += static_cast<std::int64_t>(gridDim.x) * kWarps) {
    const Row<T, X> row = open_row<T, X>(p, r);
    Normalized held[kQuads];
    float along = 0, total = 0;
#pragma unroll
    for (int q = 0; q < kQuads; q++) {
      const int column = (q * 32 + lane) * 4;
      if (column >= p.width) {
        held[q] = {};
        continue;
      }
      const Quad weight = *reinterpret_cast<const Quad*>(affine + column);
      held[q] = row.load(column, weight, *reinterpret_cast<const Quad*>(affine + width4 + column));
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float x = held[q].x.at[e], grad = held[q].grad.at[e];
        weight_sum[q].at[e] += grad * x;
        bias_sum[q].at[e] += grad;
        along += grad * weight.at[e] * x;
        total += grad * weight.at[e];
      }
    }
    if (!p.grad_x.data) continue;
    along = sum_lanes<32>(along) / p.width;
    total = sum_lanes<32>(total) / p.width;
#pragma unroll
    for (int q = 0; q < kQuads; q++) {
      const int column = (q * 32 + lane) * 4;
      if (column < p.width)
        store_gradient<X>(p, r, column, held[q], *reinterpret_cast<const Quad*>(affine + column), along, total,
                          row.rstd);
    }
  }
  if (!p.partial) return;
  for (int w = 0; w < kWarps; w++) {  // in order
    __syncthreads();
    if (warp != w) continue;
#pragma unroll
    for (int q = 0; q < kQuads; q++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int c = (q * 32 + lane) * 4 + e;
        if (c < p.width) {
          affine[c] = weight_sum[q].at[e] + (w > 0 ? affine[c] : 0.0f);
          affine[width4 + c] = bias_sum[q].at[e] + (w > 0 ? affine[width4 + c] : 0.0f);
        }
      }
    }
  }
  __syncthreads();
  float* partial = p.partial + static_cast<std::int64_t>(blockIdx.x) * 2 * p.width;
  for (int c = threadIdx.x; c < p.width; c += kWarps * 32) {
    partial[c] = affine[c];
    partial[p.width + c] = affine[width4 + c];
  }
}

// Rows of any width, by blocks of a warp that read them twice; the sums lie in memory.
template <class T, class X>
__global__ void __launch_bounds__(32) streamed_kernel(const LayerNormBackwardArgs p) {
  const int lane = threadIdx.x;
  float* partial = p.partial ? p.partial + static_cast<std::int64_t>(blockIdx.x) * 2 * p.width : nullptr;
  for (std::int64_t r = blockIdx.x; r < p.rows; r += gridDim.x) {
    Row<T, X> row = open_row<T, X>(p, r);
    float along = 0, total = 0;
    for (int column = lane * 4; column < p.width; column += 128) {
      const Quad weight = affine_quad(p.norm.weight, column, p.width);
      const Normalized v = row.load(column, weight, affine_quad(p.norm.bias, column, p.width));
#pragma unroll
      for (int e = 0; e < 4; e++) {
        if (column + e >= p.width) break;
        const float x = v.x.at[e], grad = v.grad.at[e];
        along += grad * weight.at[e] * x;
        total += grad * weight.at[e];
        if (!partial) continue;
        partial[column + e] = grad * x + (r == blockIdx.x ? 0.0f : partial[column + e]);
        partial[p.width + column + e] = grad + (r == blockIdx.x ? 0.0f : partial[p.width + column + e]);
      }
    }
    if (!p.grad_x.data) continue;
    along = sum_lanes<32>(along) / p.width;
    total = sum_lanes<32>(total) / p.width;
    row.y = nullptr;  // it stands
    for (int column = lane * 4; column < p.width; column += 128) {
      const Quad weight = affine_quad(p.norm.weight, column, p.width);
      const Normalized v = row.load(column, weight, affine_quad(p.norm.bias, column, p.width));
      store_gradient<X>(p, r, column, v, weight, along, total, row.rstd);
    }
  }
}

// As many as run at once.
int blocks_of(std::int64_t rows, int width) {
  const std::int64_t all = width <= kWidest ? (rows + kWarps - 1) / kWarps : rows;
  return static_cast<int>(std::min<std::int64_t>(all, (width <= kWidest ? 4 : 8) * multiprocessors()));
}

template <class T, class X>
Error launch_types(const LayerNormBackwardArgs& args, Stream stream) {
  const std::int64_t grid = blocks_of(args.rows, args.width);
  if (args.width > kWidest) return launch(streamed_kernel<T, X>, grid, 32, 0, stream, args);
  const std::size_t shared = 2 * sizeof(float) * ((args.width + 3) / 4 * 4);
  if (args.width <= 256) return launch(held_kernel<T, X, 2>, grid, kWarps * 32, shared, stream, args);
  if (args.width <= 512) return launch(held_kernel<T, X, 4>, grid, kWarps * 32, shared, stream, args);
  return launch(held_kernel<T, X, 6>, grid, kWarps * 32, shared, stream, args);
}

}  // namespace normalized_rows

using namespace normalized_rows;

std::int64_t layer_norm_backward_partial(std::int64_t rows, int width) {
  return static_cast<std::int64_t>(blocks_of(rows, width)) * 2 * width;
}

Error layer_norm_backward(const LayerNormBackwardArgs& args, Stream stream) {
  const Error error = with_type(args.dtype, [&](auto example) {
    using T = decltype(example);
    if (args.x.dtype == args.dtype) return launch_types<T, T>(args, stream);
    return launch_types<T, float>(args, stream);
  });
  if (error || !args.partial) return error;
  return matrix_sum({.matrices = {args.partial, DType::float32},
                     .aligned = args.width % 2 == 0,
                     .count = blocks_of(args.rows, args.width),
                     .stride = 2 * args.width,
                     .width = 2 * args.width,
                     .first_size = args.width,
                     .first = args.grad_weight,
                     .second = args.grad_bias},
                    stream);
}

}  // namespace crossvit::cuda
