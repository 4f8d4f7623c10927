// Four adjacent elements of rows, as floats.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/tile_load.cuh"

namespace crossvit::cuda {

struct Quad {
  float at[4];
};

// Four adjacent elements, moved at once.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

// Elements [column, column + 4) of a row of `columns` elements, column a multiple of four; zero behind them.
template <class T>
__device__ __forceinline__ Four<T> load_four(const T* row, int column, int columns, bool aligned) {
  if (aligned && column + 4 <= columns) return *reinterpret_cast<const Four<T>*>(row + column);
  Four<T> four;
#pragma unroll
  for (int e = 0; e < 4; e++) four.at[e] = column + e < columns ? row[column + e] : from_float<T>(0);
  return four;
}

template <class T>
__device__ __forceinline__ Quad to_quad(const Four<T>& four) {
  return {to_float(four.at[0]), to_float(four.at[1]), to_float(four.at[2]), to_float(four.at[3])};
}

template <class T>
__device__ __forceinline__ void store_four(T* row, int column, int columns, bool aligned, const Quad& quad) {
  Four<T> four;
#pragma unroll
  for (int e = 0; e < 4; e++) four.at[e] = from_float<T>(quad.at[e]);
  if (aligned && column + 4 <= columns) {
    *reinterpret_cast<Four<T>*>(row + column) = four;
  } else {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      if (column + e < columns) row[column + e] = four.at[e];
    }
  }
}

// The same of row r of a matrix whose type is known at run time.
__device__ __forceinline__ Quad load_quad(const Rows& rows, std::int64_t r, int column, int columns) {
  if (rows.dtype == DType::float32)
    return to_quad(load_four(row_of<const float>(rows, r), column, columns, rows.aligned));
  if (rows.dtype == DType::float16)
    return to_quad(load_four(row_of<const __half>(rows, r), column, columns, rows.aligned));
  return to_quad(load_four(row_of<const __nv_bfloat16>(rows, r), column, columns, rows.aligned));
}

__device__ __forceinline__ void store_quad(const Rows& rows, std::int64_t r, int column, int columns,
                                           const Quad& quad) {
  if (rows.dtype == DType::float32) {
    store_four(row_of<float>(rows, r), column, columns, rows.aligned, quad);
  } else if (rows.dtype == DType::float16) {
    store_four(row_of<__half>(rows, r), column, columns, rows.aligned, quad);
  } else {
    store_four(row_of<__nv_bfloat16>(rows, r), column, columns, rows.aligned, quad);
  }
}

}  // namespace crossvit::cuda
