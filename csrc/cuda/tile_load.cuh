// Brings tiles of matrices from global to shared memory, asynchronously and several steps ahead, and results back in
// pieces of 16 bytes.
#pragma once

#include <cuda/ptx.cuh>

#include <cstdint>

#include "cuda/rows.h"
#include "cuda/types.cuh"

namespace crossvit::cuda {

template <class T>
__device__ __forceinline__ T* row_of(const Rows& rows, std::int64_t r) {
  std::int64_t offset = r * rows.row_stride;
  if (rows.tokens != 0) {
    const std::uint32_t index = static_cast<std::uint32_t>(r), batch = index / rows.tokens;
    offset = batch * rows.batch_stride + (index - batch * rows.tokens) * rows.row_stride;
  }
  return static_cast<T*>(rows.data) + offset;
}

// min(whole - first, most), at least 0, of sizes.
__device__ __forceinline__ int rest(std::int64_t first, std::int64_t whole, int most) {
  const std::int64_t left = whole - first;
  return left < 0 ? 0 : left < most ? static_cast<int>(left) : most;
}

// Copies rows [row, row + kRows) and columns [column, column + kWidth) of a matrix (rows, columns) of T into shared memory,
// by the kThreads threads of the block: asynchronously if the matrix is aligned, then `column` is a multiple of 16 bytes,
// else element by element. What lies outside of the matrix becomes zero. The tile lies there as tile.cuh wants it: K-major
// if its rows are the product's rows or columns, transposed if they are k.
template <class T, int kRows, int kWidth, int kThreads>
__device__ __forceinline__ void load_tile(T* tile, int stride, const Rows& matrix, std::int64_t row, std::int64_t rows,
                                          std::int64_t column, std::int64_t columns) {
  constexpr int kPerRow = kWidth * static_cast<int>(sizeof(T)) / 16;  // copies
  static_assert(kWidth * sizeof(T) % 16 == 0 && (kThreads % kPerRow == 0 || kPerRow % kThreads == 0));
  constexpr int kPass = kThreads / kPerRow > 0 ? kThreads / kPerRow : 1;  // rows at once
  const int rows_inside = rest(row, rows, kRows), width_inside = rest(column, columns, kWidth);
  if (matrix.aligned) {
#pragma unroll
    for (int part = 0; part < (kPerRow + kThreads - 1) / kThreads; part++) {
      const int first = static_cast<int>(threadIdx.x) / kPerRow;
      const int c = (static_cast<int>(threadIdx.x) % kPerRow + part * kThreads) * Chunk<T>::kSize;
      const int bytes = max(0, min(16, (width_inside - c) * static_cast<int>(sizeof(T))));
      const T* base = static_cast<const T*>(matrix.data);
      tile += first * stride + c;
      if (matrix.tokens == 0) {
        const T* from = base + (row + first) * matrix.row_stride + column + c;
        const std::int64_t pass = kPass * matrix.row_stride;
#pragma unroll
        for (int r = 0; r < kRows; r += kPass) {
          if (kRows % kPass != 0 && r + first >= kRows) break;
          const bool inside = r + first < rows_inside && bytes > 0;
          ptx::copy_async(tile + r * stride, inside ? from : base, inside ? bytes : 0);
          from += pass;
        }
      } else {
#pragma unroll 1
        for (int r = 0; r + first < kRows; r += kPass) {
          const bool inside = r + first < rows_inside && bytes > 0;
          const T* from = inside ? row_of<const T>(matrix, row + first + r) + column + c : base;
          ptx::copy_async(tile + r * stride, from, inside ? bytes : 0);
        }
      }
      tile -= first * stride + c;
    }
  } else {
#pragma unroll 1
    for (int e = threadIdx.x; e < kRows * kWidth; e += kThreads) {
      const int r = e / kWidth, c = e % kWidth;
      const bool inside = r < rows_inside && c < width_inside;
      tile[r * stride + c] = inside ? row_of<const T>(matrix, row + r)[column + c] : from_float<T>(0);
    }
  }
}

// The order of a ring of kStages buffers: `load(stage, step)` begins to fill a buffer, `use(stage, step)` reads it, with
// kStages - 1 steps in flight. All threads of the block call all of it. start() may come before other work; it and run()
// take the same `load` and `steps`. Behind run() the last buffers may still be being read by other warps: __syncthreads()
// before they are written again.
template <int kStages>
struct Ring {
  static_assert(kStages >= 2);

  template <class Load>
  static __device__ __forceinline__ void start(int steps, Load&& load) {
#pragma unroll 1
    for (int step = 0; step < kStages - 1; step++) {
      if (step < steps) load(step, step);
      ptx::commit_copies();
    }
  }

  template <class Load, class Use>
  static __device__ __forceinline__ void run(int steps, Load&& load, Use&& use) {
    int stage = 0, next = kStages - 1;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
      ptx::wait_copies<kStages - 2>();
      __syncthreads();  // this step's bytes are there, and everyone has left the buffer that is filled next
      if (step + kStages - 1 < steps) load(next, step + kStages - 1);
      ptx::commit_copies();
      use(stage, step);
      stage = stage + 1 == kStages ? 0 : stage + 1;
      next = next + 1 == kStages ? 0 : next + 1;
    }
  }
};

// The elements of a chunk that lie before column `columns`, to `row` + column; aligned: 16 bytes may be stored at once.
template <class T>
__device__ __forceinline__ void store_chunk(T* row, std::int64_t column, std::int64_t columns, bool aligned,
                                            const Chunk<T>& chunk) {
  if (aligned && column + Chunk<T>::kSize <= columns) {
    *reinterpret_cast<Chunk<T>*>(row + column) = chunk;
  } else {
#pragma unroll
    for (int e = 0; e < Chunk<T>::kSize; e++) {
      if (column + e < columns) row[column + e] = chunk.at[e];
    }
  }
}

// The chunk of `row` at `column`, zero from `columns` on.
template <class T>
__device__ __forceinline__ Chunk<T> load_chunk(const T* row, std::int64_t column, std::int64_t columns, bool aligned) {
  if (aligned && column + Chunk<T>::kSize <= columns) return *reinterpret_cast<const Chunk<T>*>(row + column);
  Chunk<T> chunk;
#pragma unroll
  for (int e = 0; e < Chunk<T>::kSize; e++) chunk.at[e] = column + e < columns ? row[column + e] : from_float<T>(0);
  return chunk;
}

}  // namespace crossvit::cuda
