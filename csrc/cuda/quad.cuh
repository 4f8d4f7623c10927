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

}  // namespace crossvit::cuda
