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

// Four elements as they come from memory, float or T.
struct alignas(16) Given {
  std::uint32_t at[4];
};

template <class O>
__device__ __forceinline__ Given load_given(const Rows& rows, std::int64_t row, int column, int columns) {
  Given given;
  const Four<O> four = load_four(row_of<const O>(rows, row), column, columns, rows.aligned);
  memcpy(given.at, four.at, sizeof(four));
  return given;
}

template <class O>
__device__ __forceinline__ Four<O> four_of(const Given& given) {
  Four<O> four;
  memcpy(four.at, given.at, sizeof(four));
  return four;
}

// The forward's last steps for four sums, which begin with the bias: T is the operands' type. One code for both types that
// `out` may be of, since it is there once for every four of a thread's sums.
template <class T>
__device__ __forceinline__ void finish(const Epilogue& epilogue, std::int64_t row, int column, int columns, Quad v,
                                       const Given& residual) {
  if (epilogue.pre.data) store_four(row_of<T>(epilogue.pre, row), column, columns, epilogue.pre.aligned, v);
  if (epilogue.gelu) {
#pragma unroll
    for (int e = 0; e < 4; e++) v.at[e] = gelu<T>(v.at[e]);
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
  const auto end = [&](auto example) {
    using O = decltype(example);
    if (epilogue.residual.data) {
      const Quad more = to_quad(four_of<O>(residual));
#pragma unroll
      for (int e = 0; e < 4; e++) v.at[e] += more.at[e];
    }
    store_four(row_of<O>(epilogue.out, row), column, columns, epilogue.out.aligned, v);
  };
  if (sizeof(T) == 4 || epilogue.out.dtype == DType::float32) {
    end(float());
  } else {
    end(T());
  }
}

// The backward's last steps.
template <class T>
__device__ __forceinline__ void finish_gradient(const Epilogue& epilogue, std::int64_t row, int column, int columns,
                                                Quad v, const Given& given) {
  if (epilogue.gelu_of.data) {
    const Four<T> pre = four_of<T>(given);
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
    return bias.data && column + c < p.columns ? load(bias, column + c) : 0.0f;
  });
  Ring<kStages>::run(steps, load_step, [&](int stage, int) {
    const T* x = ring + stage * Tile::kStage;
    sum.template multiply<kDepth, false, kTransposed>(x, Tile::kXStride, x + Tile::kX, Tile::kWeightStride);
  });
  const Epilogue& epilogue = p.epilogue;
  const Rows& read = kTransposed ? epilogue.gelu_of : epilogue.residual;
  // Four at once: what is read is on its way from memory while other chunks are finished.
  sum.template for_each_chunk<float, 4>(
      staging,
      [&](int r, int c) {
        if (!read.data || row + r >= p.rows || column + c >= p.columns) return Given{};
        if (!kTransposed && read.dtype == DType::float32)
          return load_given<float>(read, row + r, column + c, p.columns);
        return load_given<T>(read, row + r, column + c, p.columns);
      },
      [&](int r, int c, const Chunk<float>& four, const Given& given) {
        if (row + r >= p.rows || column + c >= p.columns) return;
        const Quad v{four.at[0], four.at[1], four.at[2], four.at[3]};
        if constexpr (kTransposed) {
          finish_gradient<T>(epilogue, row + r, column + c, p.columns, v, given);
        } else {
          finish<T>(epilogue, row + r, column + c, p.columns, v, given);
        }
      });
}

template <class P, int kDepth, int kStages>
Error launch_tiles(const LinearArgs& args, Stream stream) {
  const std::int64_t grid = divide_up(args.rows, P::kRows) * divide_up(args.columns, P::kColumns);
  const auto run = [&]<bool kTransposed>() {
    return launch(linear_kernel<P, kDepth, kStages, kTransposed>, grid, P::kThreads,
                  LinearTile<P, kDepth, kStages, kTransposed>::kShared, stream, args);
  };
  return args.transposed ? run.template operator()<true>() : run.template operator()<false>();
}

// Few rows, whose latency counts; enough for small tiles; enough for large ones to fill the machine.
template <class T, bool kTf32>
Error launch_type(const LinearArgs& args, Stream stream) {
  if (args.rows <= 256) return launch_tiles<Product<T, kTf32, 1, 4, 1, 1>, sizeof(T) == 2 ? 64 : 32, 4>(args, stream);
  if constexpr (sizeof(T) == 2) {
    if (divide_up(args.rows, 128) * divide_up(args.columns, 128) >= multiprocessors())
      return launch_tiles<Product<T, kTf32, 2, 2, 4, 8>, 32, 3>(args, stream);
    return launch_tiles<Product<T, kTf32, 2, 2, 2, 4>, 64, 3>(args, stream);
  } else {
    return launch_tiles<Product<T, kTf32, 2, 2, 2, 4>, 32, 3>(args, stream);
  }
}

}  // namespace linear_tiles

using namespace linear_tiles;

Error linear(const LinearArgs& args, Stream stream) {
  return with_math(args.dtype, args.tf32, [&]<class T, bool kTf32>() { return launch_type<T, kTf32>(args, stream); });
}

}  // namespace crossvit::cuda
