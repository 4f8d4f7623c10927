// A Linear and its input's gradient: x weight^T or grad weight over tiles, both operands through a ring in shared memory,
// and what follows the product in registers.
#include "cuda/linear.h"

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/math.cuh"
#include "cuda/quad.cuh"
#include "cuda/tile.cuh"
#include "cuda/tile_load.cuh"

namespace crossvit::cuda {
namespace linear_tiles {

// The forward's last steps for four sums, which begin with the bias: T is the operands' type, O the result's.
template <class T, class O>
__device__ __forceinline__ void finish(const Epilogue& epilogue, std::int64_t row, int column, int columns, Quad v,
                                       const Four<O>& residual) {
  if constexpr (sizeof(O) == sizeof(T)) {
    if (epilogue.pre.data) store_four(row_of<T>(epilogue.pre, row), column, columns, epilogue.pre.aligned, v);
    if (epilogue.gelu) {
#pragma unroll
      for (int e = 0; e < 4; e++) v.at[e] = gelu<T>(v.at[e]);
    }
  }
  if (epilogue.scale.kind == Scale::sample) {
    const float scale = epilogue.scale.values[static_cast<std::uint32_t>(row) / epilogue.scale.rows_per_sample];
#pragma unroll
    for (int e = 0; e < 4; e++) v.at[e] *= scale;
  } else if (epilogue.scale.kind == Scale::channel) {
    const Quad scale = to_quad(load_four(epilogue.scale.values, column, columns, epilogue.scale.aligned));
#pragma unroll
    for (int e = 0; e < 4; e++) v.at[e] *= scale.at[e];
  }
  if (epilogue.residual.data) {
#pragma unroll
    for (int e = 0; e < 4; e++) v.at[e] += to_float(residual.at[e]);
  }
  store_four(row_of<O>(epilogue.out, row), column, columns, epilogue.out.aligned, v);
}

// The backward's last steps.
template <class T>
__device__ __forceinline__ void finish_gradient(const Epilogue& epilogue, std::int64_t row, int column, int columns,
                                                Quad v, const Four<T>& pre) {
  if (epilogue.gelu_of.data) {
    Quad activated;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float x = to_float(pre.at[e]);
      v.at[e] *= gelu_derivative<T>(x);
      activated.at[e] = gelu<T>(x);
    }
    if (epilogue.activated.data)
      store_four(row_of<T>(epilogue.activated, row), column, columns, epilogue.activated.aligned, activated);
  }
  store_four(row_of<T>(epilogue.out, row), column, columns, epilogue.out.aligned, v);
}

template <class P, int kDepth, int kStages, bool kTransposed>
struct LinearTile {
  using T = typename P::T;
  static constexpr int kXStride = k_stride<T>(kDepth);
  static constexpr int kWeightStride = kTransposed ? transposed_stride(P::kColumns) : k_stride<T>(kDepth);
  static constexpr int kX = P::kRows * kXStride;
  static constexpr int kStage = kX + (kTransposed ? kDepth : P::kColumns) * kWeightStride;
  static constexpr std::size_t kShared = kStages * kStage * sizeof(T) + P::template kStaging<float> * sizeof(float);
};

// A block a tile; blocks that share rows of x follow each other.
template <class P, int kDepth, int kStages, bool kTransposed>
__global__ void __launch_bounds__(P::kThreads) linear_kernel(const LinearArgs p) {
  using T = typename P::T;
  using Tile = LinearTile<P, kDepth, kStages, kTransposed>;
  T* ring = reinterpret_cast<T*>(ptx::shared_memory());
  float* staging = reinterpret_cast<float*>(ring + kStages * Tile::kStage);
  const int column_tiles = (p.columns + P::kColumns - 1) / P::kColumns;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x / column_tiles) * P::kRows;
  const int column = static_cast<int>(blockIdx.x % column_tiles) * P::kColumns;
  const int steps = (p.depth + kDepth - 1) / kDepth;

  const auto load_step = [&](int stage, int step) {
    T* x = ring + stage * Tile::kStage;
    load_tile<T, P::kRows, kDepth, P::kThreads>(x, Tile::kXStride, p.x, row, p.rows, step * kDepth, p.depth);
    if constexpr (kTransposed) {
      load_tile<T, kDepth, P::kColumns, P::kThreads>(x + Tile::kX, Tile::kWeightStride, p.weight, step * kDepth,
                                                     p.depth, column, p.columns);
    } else {
      load_tile<T, P::kColumns, kDepth, P::kThreads>(x + Tile::kX, Tile::kWeightStride, p.weight, column, p.columns,
                                                     step * kDepth, p.depth);
    }
  };
  Ring<kStages>::start(steps, load_step);
  P sum;
  sum.fill([&](int c) {
    const Vector& bias = p.epilogue.bias;
    return bias.data && column + c < p.columns ? load(bias.data, bias.type, column + c) : 0.0f;
  });
  Ring<kStages>::run(steps, load_step, [&](int stage, int) {
    const T* x = ring + stage * Tile::kStage;
    sum.template multiply<kDepth, false, kTransposed>(x, Tile::kXStride, x + Tile::kX, Tile::kWeightStride);
  });
  const auto store = [&](auto example, const Rows& read, const auto& last) {
    using O = decltype(example);
    sum.for_each_chunk(
        staging,
        [&](int r, int c) {
          if (!read.data || row + r >= p.rows || column + c >= p.columns) return Four<O>{};
          return load_four(row_of<const O>(read, row + r), column + c, p.columns, read.aligned);
        },
        [&](int r, int c, const Chunk<float>& four, const Four<O>& given) {
          if (row + r < p.rows && column + c < p.columns)
            last(row + r, column + c, Quad{four.at[0], four.at[1], four.at[2], four.at[3]}, given);
        });
  };
  const Epilogue& epilogue = p.epilogue;
  if constexpr (kTransposed) {
    store(T(), epilogue.gelu_of, [&](std::int64_t r, int c, const Quad& v, const Four<T>& pre) {
      finish_gradient<T>(epilogue, r, c, p.columns, v, pre);
    });
  } else if (epilogue.out.type == Type::float32) {
    store(float(), epilogue.residual, [&](std::int64_t r, int c, const Quad& v, const Four<float>& residual) {
      finish<T>(epilogue, r, c, p.columns, v, residual);
    });
  } else if constexpr (sizeof(T) == 2) {
    store(T(), epilogue.residual, [&](std::int64_t r, int c, const Quad& v, const Four<T>& residual) {
      finish<T>(epilogue, r, c, p.columns, v, residual);
    });
  }
}

template <class P, int kDepth, int kStages>
Error launch_tiles(const LinearArgs& args, Stream stream) {
  const std::int64_t tiles = ((args.rows + P::kRows - 1) / P::kRows) * ((args.columns + P::kColumns - 1) / P::kColumns);
  const dim3 grid(static_cast<unsigned>(tiles));
  if (args.transposed)
    return launch(linear_kernel<P, kDepth, kStages, true>, grid, P::kThreads,
                  LinearTile<P, kDepth, kStages, true>::kShared, stream, args);
  return launch(linear_kernel<P, kDepth, kStages, false>, grid, P::kThreads,
                LinearTile<P, kDepth, kStages, false>::kShared, stream, args);
}

// Few rows, whose latency counts; enough for small tiles; enough for large ones to fill the machine.
template <class T, bool kTf32>
Error launch_type(const LinearArgs& args, Stream stream) {
  if (args.rows <= 256) return launch_tiles<Product<T, kTf32, 1, 4, 1, 1>, sizeof(T) == 2 ? 64 : 32, 4>(args, stream);
  if constexpr (sizeof(T) == 2) {
    if (((args.rows + 127) / 128) * ((args.columns + 127) / 128) >= multiprocessors())
      return launch_tiles<Product<T, kTf32, 2, 2, 4, 8>, 32, 3>(args, stream);
    return launch_tiles<Product<T, kTf32, 2, 2, 2, 4>, 64, 3>(args, stream);
  } else {
    return launch_tiles<Product<T, kTf32, 2, 2, 2, 4>, 32, 3>(args, stream);
  }
}

}  // namespace linear_tiles

using namespace linear_tiles;

Error linear(const LinearArgs& args, Stream stream) {
  if (args.type == Type::float16) return launch_type<__half, false>(args, stream);
  if (args.type == Type::bfloat16) return launch_type<__nv_bfloat16, false>(args, stream);
  return args.tf32 ? launch_type<float, true>(args, stream) : launch_type<float, false>(args, stream);
}

}  // namespace crossvit::cuda
