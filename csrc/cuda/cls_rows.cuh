// What has one row per image: 16 images' rows stay in shared memory, the weights stream past them in tiles, two on their
// way, and the block's warps share a tile's columns.
#pragma once

#include <cuda/ptx.cuh>

#include <algorithm>
#include <cstdint>

#include "cuda/types.cuh"
#include "cuda/warp_product.cuh"

namespace crossvit::cuda {

constexpr int kRowWarps = 8, kRowThreads = 32 * kRowWarps;
constexpr int kImages = 16;

__host__ __device__ constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Blocks that a batch takes, for every head or part of the columns.
inline std::int64_t blocks_of(std::int64_t batch) { return divide_up(batch, kImages); }

// The images of a block and which of `parts` it has: its head, or a part of the columns.
struct Place {
  int part, rows;
  std::int64_t image;
  __device__ __forceinline__ Place(int parts, std::int64_t batch)
      : part(blockIdx.x % parts), image(static_cast<std::int64_t>(blockIdx.x / parts) * kImages) {
    rows = static_cast<int>(min(batch - image, static_cast<std::int64_t>(kImages)));
  }
};

// Elements from a row of `columns` elements, a multiple of 16, to the next: an odd number of 16 bytes.
template <class T>
__host__ __device__ constexpr int odd_stride(int columns) {
  constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
  return (columns / kChunk | 1) * kChunk;
}

// A contiguous matrix of T in global memory, its rows `stride` apart.
struct MatrixView {
  const void* data;
  std::int64_t stride;
  bool aligned;  // rows and every column that is asked for begin at multiples of 16 bytes
};

// Begins to copy `rows` x `columns` elements from (row, column) on into rows `stride` apart, zeros behind them up to
// multiples of 16; by all threads of the block.
template <class T>
__device__ __forceinline__ void fill_tile(T* tile, int stride, const MatrixView& matrix, std::int64_t row, int rows,
                                          std::int64_t column, int columns) {
  constexpr int kChunk = Chunk<T>::kSize;
  const T* from = static_cast<const T*>(matrix.data) + row * matrix.stride + column;
  const int padded_rows = round_up(rows, 16), padded_columns = round_up(columns, 16);
  if (matrix.aligned) {
    int lanes = 1, shift = 0;  // to a row
    while (lanes < 32 && lanes * kChunk < padded_columns) lanes *= 2, shift++;
    for (int r = threadIdx.x >> shift; r < padded_rows; r += kRowThreads >> shift) {
      const T* at = from + r * matrix.stride;
      for (int c = (threadIdx.x & (lanes - 1)) * kChunk; c < padded_columns; c += lanes * kChunk) {
        const int bytes = r < rows ? max(0, min(columns - c, kChunk)) * static_cast<int>(sizeof(T)) : 0;
        ptx::copy_async(tile + r * stride + c, bytes ? at + c : from, bytes);
      }
    }
  } else {
    for (int r = threadIdx.x / 32; r < padded_rows; r += kRowWarps)
      for (int c = threadIdx.x % 32; c < padded_columns; c += 32)
        tile[r * stride + c] = r < rows && c < columns ? from[r * matrix.stride + c] : from_float<T>(0);
  }
}

// fill(step, buffer) for all steps, one buffer or two ahead of use(step, buffer); `prepare` runs while the first fill. Behind
// it all threads have met.
template <class Fill, class Prepare, class Use>
__device__ __forceinline__ void stream_tiles(int steps, int buffers, Fill&& fill, Prepare&& prepare, Use&& use) {
#pragma unroll 1
  for (int step = -buffers; step < steps; step++) {
    const int buffer = buffers == 1 ? 0 : step & 1;
    if (step == 0) prepare();
    if (step >= 0) {
      if (buffers == 1) {
        ptx::wait_copies<0>();
      } else {
        ptx::wait_copies<1>();
      }
      __syncthreads();
      use(step, buffer);
      __syncthreads();
    }
    if (step + buffers < steps) fill(step + buffers, buffer);
    ptx::commit_copies();
  }
}

// f(row, column, v) for the products (16, columns) of rows a (16, depth) in shared memory with a tile (columns, depth). Depth
// and columns are multiples of 16.
template <bool kTf32, class T, class F>
__device__ __forceinline__ void rows_by_rows(const T* a, int a_stride, const T* tile, int tile_stride, int columns,
                                             int depth, F&& f) {
  const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
  for (int n = threadIdx.x / 32 * 8; n < columns; n += kRowWarps * 8) {
    float d[1][4] = {};
    multiply_warp<kTf32, false, false>(d, a, a_stride, tile + n * tile_stride, tile_stride, depth);
#pragma unroll
    for (int e = 0; e < 4; e++) f(row + e / 2 * 8, n + column + e % 2, d[0][e]);
  }
}

// f(row, column, v0, v1), v1 of column + 1, for the same with a tile (depth, columns), the rows the sum of `parts` matrices (16, depth), one behind the other.
template <bool kTf32, class T, class F>
__device__ __forceinline__ void rows_by_columns(const T* a, int a_stride, int parts, const T* tile, int tile_stride,
                                                int columns, int depth, F&& f) {
  const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
  for (int n = threadIdx.x / 32 * 16; n < columns; n += kRowWarps * 16) {
    float d[2][4] = {};
    for (int part = 0; part < parts; part++)
      multiply_warp<kTf32, false, true>(d, a + part * kImages * a_stride, a_stride, tile + n, tile_stride, depth);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      f(row, n + j * 8 + column, d[j][0], d[j][1]);
      f(row + 8, n + j * 8 + column, d[j][2], d[j][3]);
    }
  }
}

// Elements first, first + 32, ... of a row of `dtype`, zero from `width` on. The type is asked for once, so that all loads
// are on their way together.
template <int kSize>
__device__ __forceinline__ void read_row(float (&x)[kSize], const void* row, DType dtype, int first, int width) {
  const auto read = [&](const auto* from) {
#pragma unroll
    for (int j = 0; j < kSize; j++) x[j] = first + 32 * j < width ? to_float(from[first + 32 * j]) : 0;
  };
  if (dtype == DType::float32) {
    read(static_cast<const float*>(row));
  } else if (dtype == DType::float16) {
    read(static_cast<const __half*>(row));
  } else {
    read(static_cast<const __nv_bfloat16*>(row));
  }
}

// f(column, x^) for this lane's share of a row in memory, x^ = (x - mean) rstd by two passes over x - x[0]; by a whole warp.
template <class F>
__device__ __forceinline__ void layer_norm_row(const void* from, DType dtype, int width, float eps, F&& f) {
  constexpr int kHeld = 24;  // that a lane keeps in registers for the statistics; of wider rows the rest is read again
  const int lane = threadIdx.x % 32;
  const float origin = load(from, dtype, 0);
  float x[kHeld];
  float sum = 0, squares = 0;
  read_row(x, from, dtype, lane, width);
#pragma unroll
  for (int j = 0; j < kHeld; j++) sum += lane + 32 * j < width ? x[j] -= origin : 0;
  for (int c = lane + 32 * kHeld; c < width; c += 32) sum += load(from, dtype, c) - origin;
  const float shift = sum_lanes<32>(sum) / width;
#pragma unroll
  for (int j = 0; j < kHeld; j++) {
    x[j] -= shift;
    squares += lane + 32 * j < width ? x[j] * x[j] : 0;
  }
  for (int c = lane + 32 * kHeld; c < width; c += 32) {
    const float rest = (load(from, dtype, c) - origin) - shift;
    squares = fmaf(rest, rest, squares);
  }
  const float rstd = rsqrtf(sum_lanes<32>(squares) / width + eps);
  // Read again, from L1, by a short loop: f may be long.
  constexpr int kAtOnce = 4;
#pragma unroll 1
  for (int c = lane; c < width; c += 32 * kAtOnce) {
    float again[kAtOnce];
    read_row(again, from, dtype, c, width);
#pragma unroll
    for (int j = 0; j < kAtOnce; j++)
      if (c + 32 * j < width) f(c + 32 * j, ((again[j] - origin) - shift) * rstd);
  }
}

// gamma x^ + beta, an absent one of them 1 or 0.
struct Affine {
  Vector weight, bias;
  __device__ __forceinline__ float operator()(float x, int c) const {
    if (weight.data) x *= load(weight, c);
    return bias.data ? x + load(bias, c) : x;
  }
};

// act(gamma x^ + beta) of 16 rows of `dtype` in memory, to shared memory, zeros behind and below them; `from` is the first
// row, `rows` of them are there.
template <class T, class Activation>
__device__ __forceinline__ void layer_norm_rows(const void* from, DType dtype, std::int64_t row_stride, int rows,
                                                int width, float eps, const Affine& affine, T* to, int stride,
                                                Activation&& activation) {
  const int lane = threadIdx.x % 32;
  for (int r = threadIdx.x / 32; r < kImages; r += kRowWarps) {
    T* row = to + r * stride;
    if (r >= rows) {
      for (int c = lane; c < round_up(width, 16); c += 32) row[c] = from_float<T>(0);
      continue;
    }
    for (int c = width + lane; c < round_up(width, 16); c += 32) row[c] = from_float<T>(0);
    const auto keep = [&](int c, float x) { row[c] = from_float<T>(activation(affine(x, c))); };
    const std::int64_t bytes = r * row_stride * (dtype == DType::float32 ? 4 : 2);
    layer_norm_row(static_cast<const char*>(from) + bytes, dtype, width, eps, keep);
  }
}

// How many rows (or columns) of tiles `across` elements wide, a multiple of 16 and at most `most`, fit `bytes`.
inline int tile_size(int most, std::int64_t bytes_of_one, std::int64_t bytes) {
  int size = round_up(most, 16);
  while (size > 16 && size * bytes_of_one > bytes) size = round_up(size / 2, 16);
  return size;
}

}  // namespace crossvit::cuda
