// From the normalised CLS tokens of 16 images to a head's query and key_query, tile by tile of W_q and W_k.
#pragma once

#include "cuda/cls_cross_attention.h"
#include "cuda/cls_rows.cuh"

namespace crossvit::cuda {

// 16 bits would cost sharp scores their place, so that the query goes on as the sum of two numbers.
template <class T>
constexpr int query_parts = sizeof(T) == 2 ? 2 : 1;

// Rows of W_q (or W_v) and columns of W_k in a tile.
struct Tiles {
  int rows, columns;
};

template <class T, bool kTf32>
struct HeadQuery : Place {
  const ClsQuery& a;
  const Tiles& tiles;
  int head = part;
  int d, padded_d, columns, y_stride, q_stride, k_stride, q_steps, k_steps;

  __device__ __forceinline__ HeadQuery(const ClsQuery& a, const Tiles& tiles)
      : Place(a.heads, a.batch), a(a), tiles(tiles) {
    d = a.width / a.heads;
    padded_d = round_up(d, 16);
    columns = round_up(a.width, 16);
    y_stride = odd_stride<T>(columns);
    q_stride = odd_stride<T>(padded_d);
    k_stride = odd_stride<T>(tiles.columns);
    q_steps = (d + tiles.rows - 1) / tiles.rows;
    k_steps = (a.width + tiles.columns - 1) / tiles.columns;
  }

  // Elements of a tile, of the host's reckoning too.
  static __host__ __device__ int tile_elements(int width, int d, const Tiles& tiles) {
    const int of_q = tiles.rows * odd_stride<T>(round_up(width, 16));
    const int of_k = round_up(d, 16) * odd_stride<T>(tiles.columns);
    return of_q > of_k ? of_q : of_k;
  }

  __device__ __forceinline__ void fill(int step, T* tile) const {
    if (step < q_steps) {
      const int j = step * tiles.rows;
      fill_tile(tile, y_stride, MatrixView{a.q_weight, a.width, a.aligned}, head * d + j, min(d - j, tiles.rows), 0,
                a.width);
    } else {
      const int c = (step - q_steps) * tiles.columns;
      fill_tile(tile, k_stride, MatrixView{a.k_weight, a.width, a.aligned}, head * d, d, c,
                min(a.width - c, tiles.columns));
    }
  }

  // y (16, width) is the normalised CLS; q (query_parts, 16, d).
  __device__ __forceinline__ void use(int step, const T* tile, const T* y, T* q) const {
    if (step < q_steps) {
      const int first = step * tiles.rows;
      rows_by_rows<kTf32>(y, y_stride, tile, y_stride, min(padded_d - first, tiles.rows), columns,
                          [&](int row, int column, float value) {
                            const int j = first + column;
                            if (j < d) {
                              if (a.q_bias.data) value += load(a.q_bias, head * d + j);
                              if (a.query && row < rows) a.query[(image + row) * a.width + head * d + j] = value;
                            } else {
                              value = 0;
                            }
                            const T high = from_float<T>(value);
                            q[row * q_stride + j] = high;
                            if constexpr (query_parts<T> == 2)
                              q[(kImages + row) * q_stride + j] = from_float<T>(remainder_of(value, high));
                          });
    } else {
      const int first = (step - q_steps) * tiles.columns;
      const float scale = 1 / sqrtf(static_cast<float>(d));
      rows_by_columns<kTf32>(q, q_stride, query_parts<T>, tile, k_stride,
                             round_up(min(a.width - first, tiles.columns), 16), padded_d,
                             [&](int row, int column, float v0, float v1) {
                               const int c = first + column;
                               if (row >= rows) return;
                               float* to = a.key_query + ((image + row) * a.heads + head) * a.width + c;
                               if (c < a.width) to[0] = v0 * scale;
                               if (c + 1 < a.width) to[1] = v1 * scale;
                             });
    }
  }
};

}  // namespace crossvit::cuda
