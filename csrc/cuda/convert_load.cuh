// Tiles of a matrix whose type is known at run time: that of the tile, or float32, rounded on the way.
#pragma once

#include <cstdint>

#include "cuda/tile_load.cuh"

namespace crossvit::cuda {

// load_tile() for any width that is a multiple of 16 bytes.
template <class T, int kRows, int kWidth, int kThreads>
__device__ __forceinline__ void load_wide_tile(T* tile, int stride, const Rows& matrix, std::int64_t row,
                                               std::int64_t rows, std::int64_t column, std::int64_t columns) {
  constexpr int kPart = kWidth >= 256 ? 256 : kWidth >= 128 ? 128 : kWidth >= 64 ? 64 : kWidth >= 32 ? 32 : 16;
  load_tile<T, kRows, kPart, kThreads>(tile, stride, matrix, row, rows, column, columns);
  if constexpr (kWidth > kPart) {
    load_wide_tile<T, kRows, kWidth - kPart, kThreads>(tile + kPart, stride, matrix, row, rows, column + kPart,
                                                       columns);
  }
}

// The same for a matrix of T or of float32; the latter's tile is written before this returns.
template <class T, int kRows, int kWidth, int kThreads>
__device__ __forceinline__ void load_tile_as(T* tile, int stride, const Rows& matrix, std::int64_t row,
                                             std::int64_t rows, std::int64_t column, std::int64_t columns) {
  if (sizeof(T) == 4 || matrix.dtype != DType::float32) {
    load_wide_tile<T, kRows, kWidth, kThreads>(tile, stride, matrix, row, rows, column, columns);
    return;
  }
  if constexpr (sizeof(T) == 2) {
    constexpr int kPerRow = kWidth / 4, kPieces = kRows * kPerRow;
    const int rows_inside = rest(row, rows, kRows), width_inside = rest(column, columns, kWidth);
#pragma unroll 4
    for (int piece = threadIdx.x; piece < kPieces; piece += kThreads) {
      const int r = piece / kPerRow, c = piece % kPerRow * 4;
      Chunk<float> four{};
      if (r < rows_inside && c < width_inside) {
        four = load_chunk(row_of<const float>(matrix, row + r) + column, c, width_inside, matrix.aligned);
      }
      *reinterpret_cast<uint2*>(tile + r * stride + c) =
          make_uint2(pack<T>(four.at[0], four.at[1]), pack<T>(four.at[2], four.at[3]));
    }
  }
}

}  // namespace crossvit::cuda
