// cls_fusion around the pass over the tokens. Where a step needs a whole row that the step before makes in pieces, every
// block makes all of it (the projection: its weight is small) or each head adds its part in a launch of its own.
#include "cuda/cls_fusion.h"

#include "cuda/cls_contexts.cuh"
#include "cuda/cls_query.cuh"
#include "cuda/launch.cuh"

namespace crossvit::cuda {

namespace {

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1 + erff(x * 0.7071067811865476f)); }

// Where things lie in shared memory: what LayerNorm makes of cls and, then, of its projection; the query; the projection in
// float32; the tiles.
template <class T, bool kTf32>
struct QueryMemory {
  std::int64_t q, projected, tiles, tile, total;
  __host__ __device__ QueryMemory(int own, int width, int heads, const Tiles& sizes, int own_rows, int buffers) {
    const int d = width / heads, row = odd_stride<T>(round_up(width, 16)), own_row = odd_stride<T>(round_up(own, 16));
    q = kImages * (row > own_row ? row : own_row) * sizeof(T);
    projected = q + query_parts<T> * kImages * odd_stride<T>(round_up(d, 16)) * sizeof(T);
    tiles = projected + kImages * (round_up(width, 16) + 4) * sizeof(float);
    const int of_query = HeadQuery<T, kTf32>::tile_elements(width, d, sizes), of_own = own_rows * own_row;
    tile = of_query > of_own ? of_query : of_own;
    total = tiles + buffers * tile * sizeof(T);
  }
};

template <class T, bool kTf32>
__global__ void __launch_bounds__(kRowThreads, 1)
    fusion_query_kernel(const FusionQuery a, const Tiles tiles, const int own_rows, const int buffers) {
  const HeadQuery<T, kTf32> of_head(a.query, tiles);
  const int width = a.query.width, rows = of_head.rows, own_columns = round_up(a.own_width, 16);
  const int own_stride = odd_stride<T>(own_columns), c_stride = of_head.columns + 4;
  unsigned char* const memory = ptx::shared_memory();
  const QueryMemory<T, kTf32> at(a.own_width, width, a.query.heads, tiles, own_rows, buffers);
  T* const y = reinterpret_cast<T*>(memory);
  T* const q = reinterpret_cast<T*>(memory + at.q);
  float* const projected = reinterpret_cast<float*>(memory + at.projected);
  T* const first_tile = reinterpret_cast<T*>(memory + at.tiles);

  const int own_steps = (width + own_rows - 1) / own_rows;
  const MatrixView weight{a.weight, a.own_width, a.aligned};
  const auto fill = [&](int step, int stage) {
    T* tile = first_tile + stage * at.tile;
    if (step < own_steps) {
      const int e = step * own_rows;
      fill_tile(tile, own_stride, weight, e, min(width - e, own_rows), 0, a.own_width);
    } else {
      of_head.fill(step - own_steps, tile);
    }
  };
  const auto normalize = [&] {
    const std::int64_t bytes = of_head.image * a.cls_stride * (a.cls_dtype == DType::float32 ? 4 : 2);
    layer_norm_rows(static_cast<const char*>(a.cls) + bytes, a.cls_dtype, a.cls_stride, rows, a.own_width, a.query.eps,
                    Affine{a.norm_weight, a.norm_bias}, y, own_stride, gelu);
  };
  stream_tiles(own_steps + of_head.q_steps + of_head.k_steps, buffers, fill, normalize, [&](int step, int stage) {
    const T* tile = first_tile + stage * at.tile;
    if (step < own_steps) {
      const int first = step * own_rows;
      rows_by_rows<kTf32>(y, own_stride, tile, own_stride, min(of_head.columns - first, own_rows), own_columns,
                          [&](int row, int column, float v) {
                            const int c = first + column;
                            if (c >= width) return;
                            v += load_or_zero(a.bias, c);
                            projected[row * c_stride + c] = v;
                            if (of_head.head == 0 && row < rows) a.projected[(of_head.image + row) * width + c] = v;
                          });
      return;
    }
    if (step == own_steps) {
      layer_norm_rows(projected, DType::float32, c_stride, rows, width, a.query.eps,
                      Affine{a.query.norm_weight, a.query.norm_bias}, y, of_head.y_stride, [](float x) { return x; });
      __syncthreads();
    }
    of_head.use(step - own_steps, tile, y, q);
  });
}

template <class T, bool kTf32>
__global__ void __launch_bounds__(kRowThreads, 1) fusion_value_kernel(const FusionValue a, const Tiles tiles) {
  const auto [head, rows, image] = Place(a.heads, a.batch);
  const int d = a.width / a.heads, padded_d = round_up(d, 16), columns = round_up(a.width, 16);
  const int stride = odd_stride<T>(columns), v_stride = odd_stride<T>(padded_d);
  T* const y = reinterpret_cast<T*>(ptx::shared_memory());
  T* const v = y + kImages * stride;
  T* const first_tile = v + kImages * v_stride;
  const int tile_elements = max(tiles.rows * stride, tiles.columns * v_stride);
  float* const shares = reinterpret_cast<float*>(first_tile + 2 * tile_elements);

  // Tiles of rows of W_v, then of rows of W_o in this head's columns.
  const int v_steps = (d + tiles.rows - 1) / tiles.rows, out_steps = (a.width + tiles.columns - 1) / tiles.columns;
  const MatrixView v_weight{a.v_weight, a.width, a.aligned}, out_weight{a.out_weight, a.width, a.heads_aligned};
  const auto fill = [&](int step, int stage) {
    T* tile = first_tile + stage * tile_elements;
    if (step < v_steps) {
      const int j = step * tiles.rows;
      fill_tile(tile, stride, v_weight, head * d + j, min(d - j, tiles.rows), 0, a.width);
    } else {
      const int e = (step - v_steps) * tiles.columns;
      fill_tile(tile, v_stride, out_weight, e, min(a.width - e, tiles.columns), head * d, d);
    }
  };
  const auto join = [&] {
    read_shares(a.contexts, image, rows, a.heads, head, shares);
    join_contexts(a.contexts, image, rows, a.heads, head, a.width, Affine{a.norm_weight, a.norm_bias}, shares, y,
                  stride);
  };
  stream_tiles(v_steps + out_steps, 2, fill, join, [&](int step, int stage) {
    const T* tile = first_tile + stage * tile_elements;
    if (step < v_steps) {
      const int first = step * tiles.rows;
      rows_by_rows<kTf32>(y, stride, tile, stride, min(padded_d - first, tiles.rows), columns,
                          [&](int row, int column, float value) {
                            const int j = first + column;
                            if (j < d && a.v_bias.data) value += load(a.v_bias, head * d + j);
                            v[row * v_stride + j] = from_float<T>(j < d ? value : 0);
                          });
    } else {
      const int first = (step - v_steps) * tiles.columns;
      rows_by_rows<kTf32>(v, v_stride, tile, v_stride, min(columns - first, tiles.columns), padded_d,
                          [&](int row, int column, float value) {
                            const int c = first + column;
                            if (row < rows && c < a.width)
                              a.out[((image + row) * a.heads + head) * a.width + c] = value;
                          });
    }
  });
}

template <class T, bool kTf32>
__global__ void __launch_bounds__(kRowThreads, 1)
    fusion_revert_kernel(const FusionRevert a, const int tile_rows, const int blocks, const int buffers) {
  const auto [part, rows, image] = Place(blocks, a.batch);
  const int first = part * tile_rows;
  const int columns = round_up(a.width, 16), stride = odd_stride<T>(columns), f_stride = columns + 4;
  float* const fused = reinterpret_cast<float*>(ptx::shared_memory());
  T* const y = reinterpret_cast<T*>(fused + kImages * f_stride);
  T* const tile = y + kImages * stride;

  const MatrixView weight{a.weight, a.width, a.aligned};
  const int here = min(a.own_width - first, tile_rows);
  const auto fill = [&](int, int) { fill_tile(tile, stride, weight, first, here, 0, a.width); };
  const auto fuse = [&] {
    for (int c = threadIdx.x; c < a.width; c += kRowThreads) {
      const float bias = load_or_zero(a.out_bias, c);
#pragma unroll 4
      for (int r = 0; r < rows; r++) {
        const float* from = a.heads_out + (image + r) * a.heads * a.width + c;
        float sum = 0;
#pragma unroll 4
        for (int h = 0; h < a.heads; h++) sum += from[h * a.width];
        fused[r * f_stride + c] = (sum + bias) + a.projected[(image + r) * a.width + c];
      }
    }
    __syncthreads();
    layer_norm_rows(fused, DType::float32, f_stride, rows, a.width, a.eps, Affine{a.norm_weight, a.norm_bias}, y,
                    stride, gelu);
  };
  stream_tiles(1, buffers, fill, fuse, [&](int, int) {
    rows_by_rows<kTf32>(y, stride, tile, stride, round_up(here, 16), columns, [&](int row, int column, float v) {
      const int c = first + column;
      if (row >= rows || c >= a.own_width) return;
      v += load_or_zero(a.bias, c);
      static_cast<T*>(a.out)[(image + row) * a.own_width + c] = from_float<T>(v);
    });
  });
}

}  // namespace

Error fusion_query(const FusionQuery& args, Stream stream) {
  const ClsQuery& query = args.query;
  return with_math(query.dtype, query.tf32, [&]<class T, bool kTf32>() -> Error {
    const int d = round_up(query.width / query.heads, 16), columns = round_up(query.width, 16);
    const std::int64_t row = odd_stride<T>(columns) * sizeof(T);
    const std::int64_t own_row = odd_stride<T>(round_up(args.own_width, 16)) * sizeof(T);
    const auto memory = [&](const Tiles& tiles, int own_rows, int buffers) {
      return QueryMemory<T, kTf32>(args.own_width, query.width, query.heads, tiles, own_rows, buffers);
    };
    for (int buffers = 2; buffers > 0; buffers--) {
      const std::int64_t room = (kSharedMemory - memory(Tiles{0, 0}, 0, 0).tiles) / buffers;
      const Tiles tiles{tile_size(d, row, room), tile_size(columns, d * sizeof(T), room - 16 * d)};
      const int own_rows = tile_size(std::min(columns, 64), own_row, room);
      const std::int64_t shared = memory(tiles, own_rows, buffers).total;
      if (shared > kSharedMemory && buffers > 1) continue;
      return launch(fusion_query_kernel<T, kTf32>, blocks_of(query.batch) * query.heads, kRowThreads, shared, stream,
                    args, tiles, own_rows, buffers);
    }
    return nullptr;
  });
}

Error fusion_value(const FusionValue& args, Stream stream) {
  return with_math(args.dtype, args.tf32, [&]<class T, bool kTf32>() {
    const int d = round_up(args.width / args.heads, 16), columns = round_up(args.width, 16);
    const std::int64_t row = odd_stride<T>(columns) * sizeof(T), v_row = odd_stride<T>(d) * sizeof(T);
    const std::int64_t fixed = kImages * (row + v_row) + kShares * sizeof(float), room = (kSharedMemory - fixed) / 2;
    const Tiles tiles{tile_size(d, row, room), tile_size(columns, v_row, room)};
    const std::int64_t tile = std::max(tiles.rows * row, tiles.columns * v_row);
    return launch(fusion_value_kernel<T, kTf32>, blocks_of(args.batch) * args.heads, kRowThreads, fixed + 2 * tile,
                  stream, args, tiles);
  });
}

Error fusion_revert(const FusionRevert& args, Stream stream) {
  return with_math(args.dtype, args.tf32, [&]<class T, bool kTf32>() {
    const int columns = round_up(args.width, 16);
    const std::int64_t row = odd_stride<T>(columns) * sizeof(T);
    const std::int64_t fixed = kImages * ((columns + 4) * sizeof(float) + row);
    const int tile = tile_size(std::min(round_up(args.own_width, 16), 64), row, kSharedMemory - fixed);
    const int blocks = (args.own_width + tile - 1) / tile;
    return launch(fusion_revert_kernel<T, kTf32>, blocks_of(args.batch) * blocks, kRowThreads, fixed + tile * row,
                  stream, args, tile, blocks, 1);
  });
}

}  // namespace crossvit::cuda
