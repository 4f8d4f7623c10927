// The gradient of a Linear's weight and bias, by sums over pieces of the rows that are added in order; and what is done to
// a gradient before it meets a product.
#include <algorithm>
#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/linear.h"
#include "cuda/math.cuh"
#include "cuda/matrix_sum.h"
#include "cuda/quad.cuh"
#include "cuda/tile.cuh"
#include "cuda/tile_load.cuh"

namespace crossvit::cuda {
namespace linear_sums {

// How the sums are cut: tiles of the result, and pieces of the rows, whose sums lie piece_size floats apart.
struct WeightPlan {
  bool large;
  int row_tiles, column_tiles;
  std::int64_t pieces, rows_per_piece, piece_size;
};

// As few pieces as fill the machine about twice.
WeightPlan plan_of(const WeightGradientArgs& args) {
  WeightPlan plan;
  const std::int64_t processors = multiprocessors();
  plan.large = args.dtype != DType::float32 && args.features > 64 && args.width > 64 && args.rows >= 32 * processors;
  const int side = plan.large ? 128 : 64;
  const std::int64_t depth = args.dtype == DType::float32 || plan.large ? 32 : 64;
  plan.row_tiles = (args.features + side - 1) / side;
  plan.column_tiles = args.grad_weight.data ? (args.width + side - 1) / side : 1;
  const std::int64_t tiles = static_cast<std::int64_t>(plan.row_tiles) * plan.column_tiles;
  plan.pieces = std::max<std::int64_t>(1, std::min(2 * processors / tiles, args.rows / (4 * depth)));
  plan.rows_per_piece = ((args.rows + plan.pieces - 1) / plan.pieces + depth - 1) / depth * depth;
  plan.pieces = (args.rows + plan.rows_per_piece - 1) / plan.rows_per_piece;
  const std::int64_t size = args.grad_weight.data ? static_cast<std::int64_t>(args.features) * args.width : 0;
  plan.piece_size = size + (args.grad_bias.data ? args.features : 0);
  plan.piece_size = (plan.piece_size + 3) / 4 * 4;
  return plan;
}

template <class P, int kDepth>
struct WeightTile {
  using T = typename P::T;
  static constexpr int kGradStride = transposed_stride(P::kRows), kXStride = transposed_stride(P::kColumns);
  static constexpr int kGrad = kDepth * kGradStride, kStage = kGrad + kDepth * kXStride;
  static constexpr std::size_t shared(int stages) {
    return stages * kStage * sizeof(T) + P::template kStaging<float> * sizeof(float);
  }
};

// A block a tile of grad^T x over a piece of the rows; those of the first column tile add up the bias's gradient, too.
// Without the bound of three blocks of float32 the compiler keeps to registers for five on sm_100, and spills.
template <class P, int kDepth, int kStages>
__global__ void __launch_bounds__(P::kThreads, sizeof(typename P::T) == 4 ? 3 : 1)
    weight_gradient_kernel(const WeightGradientArgs p, const WeightPlan plan) {
  using T = typename P::T;
  using Tile = WeightTile<P, kDepth>;
  static_assert(P::kThreads >= P::kRows);
  T* ring = reinterpret_cast<T*>(ptx::shared_memory());
  float* staging = reinterpret_cast<float*>(ring + kStages * Tile::kStage);
  const int row = static_cast<int>(blockIdx.x) % plan.row_tiles * P::kRows;
  const int column = static_cast<int>(blockIdx.x) / plan.row_tiles * P::kColumns;
  const std::int64_t piece = blockIdx.y, begin = piece * plan.rows_per_piece;
  const std::int64_t end = min(begin + plan.rows_per_piece, p.rows);
  const int steps = static_cast<int>((end - begin + kDepth - 1) / kDepth);
  const bool weight_wanted = p.grad_weight.data, bias_wanted = p.grad_bias.data && column == 0;

  const auto load_step = [&](int stage, int step) {
    T* grad = ring + stage * Tile::kStage;
    const std::int64_t first = begin + static_cast<std::int64_t>(step) * kDepth;
    load_tile<T, kDepth, P::kRows, P::kThreads>(grad, Tile::kGradStride, p.grad, first, end, row, p.features);
    if (weight_wanted) {
      load_tile<T, kDepth, P::kColumns, P::kThreads>(grad + Tile::kGrad, Tile::kXStride, p.x, first, end, column,
                                                     p.width);
    }
  };
  P sum;
  sum.clear();
  float bias = 0;
  Ring<kStages>::start(steps, load_step);
  Ring<kStages>::run(steps, load_step, [&](int stage, int) {
    const T* grad = ring + stage * Tile::kStage;
    if (weight_wanted)
      sum.template multiply<kDepth, true, true>(grad, Tile::kGradStride, grad + Tile::kGrad, Tile::kXStride);
    if (bias_wanted && threadIdx.x < P::kRows) {
      float part = 0;
#pragma unroll 8
      for (int k = 0; k < kDepth; k++) part += to_float(grad[k * Tile::kGradStride + threadIdx.x]);
      bias += part;
    }
  });

  const bool whole = plan.pieces == 1;
  float* partial = p.partial + piece * plan.piece_size;
  const auto store = [&](auto example, auto* to, bool aligned) {
    using O = decltype(example);
    sum.for_each_chunk(staging, [&](int r, int c, const Chunk<float>& four) {
      if (row + r < p.features && column + c < p.width) {
        store_four<O>(to + static_cast<std::int64_t>(row + r) * p.width, column + c, p.width, aligned,
                      {four.at[0], four.at[1], four.at[2], four.at[3]});
      }
    });
  };
  if (weight_wanted) {
    if (whole) {
      store(T(), static_cast<T*>(p.grad_weight.data), p.grad_weight.aligned);
    } else {
      store(float(), partial, p.width % 4 == 0);
    }
  }
  if (bias_wanted && threadIdx.x < P::kRows && row + static_cast<int>(threadIdx.x) < p.features) {
    const int feature = row + static_cast<int>(threadIdx.x);
    const std::int64_t size = weight_wanted ? static_cast<std::int64_t>(p.features) * p.width : 0;
    if (whole) {
      cuda::store(p.grad_bias, feature, bias);
    } else {
      partial[size + feature] = bias;
    }
  }
}

template <class P, int kDepth, int kStages>
Error launch_weight(const WeightGradientArgs& args, const WeightPlan& plan, Stream stream) {
  const dim3 grid(static_cast<unsigned>(plan.row_tiles * plan.column_tiles), static_cast<unsigned>(plan.pieces));
  return launch(weight_gradient_kernel<P, kDepth, kStages>, grid, P::kThreads, WeightTile<P, kDepth>::shared(kStages),
                stream, args, plan);
}

template <class T, bool kTf32>
Error launch_type(const WeightGradientArgs& args, const WeightPlan& plan, Stream stream) {
  if constexpr (sizeof(T) == 2) {
    if (plan.large) return launch_weight<Product<T, false, 2, 2, 4, 8>, 32, 4>(args, plan, stream);
    return launch_weight<Product<T, false, 2, 2, 2, 4>, 64, 3>(args, plan, stream);
  } else {
    return launch_weight<Product<T, kTf32, 2, 2, 2, 4>, 32, 3>(args, plan, stream);
  }
}

constexpr int kGradientRows = 4;  // of a block, one a warp

// G is the type of grad.
template <class T, class G>
__global__ void __launch_bounds__(kGradientRows * 32) scaled_gradient_kernel(const ScaledGradientArgs p) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kGradientRows + threadIdx.x / 32;
  if (row >= p.rows) return;
  const G* grad = row_of<const G>(p.grad, row);
  const T* pre = p.pre.data ? row_of<const T>(p.pre, row) : nullptr;
  T* out = row_of<T>(p.out, row);
  float factor = 1;
  if (p.scale.kind == Scale::sample) factor = p.scale.values[static_cast<std::uint32_t>(row) / p.scale.rows_per_sample];
#pragma unroll 2
  for (int column = threadIdx.x % 32 * 4; column < p.columns; column += 128) {
    Quad v = to_quad(load_four(grad, column, p.columns, p.grad.aligned));
    if (pre) {
      const Quad x = to_quad(load_four(pre, column, p.columns, p.pre.aligned));
#pragma unroll
      for (int e = 0; e < 4; e++) v.at[e] *= gelu_derivative<T>(x.at[e]);
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
      if (p.scale.kind == Scale::channel) factor = p.scale.values[min(column + e, p.columns - 1)];
      if (p.scale.kind != Scale::none) v.at[e] *= factor;
    }
    store_four(out, column, p.columns, p.out.aligned, v);
  }
}

}  // namespace linear_sums

using namespace linear_sums;

std::int64_t weight_gradient_partial(const WeightGradientArgs& args) {
  const WeightPlan plan = plan_of(args);
  return plan.pieces == 1 ? 0 : plan.pieces * plan.piece_size;
}

Error weight_gradient(const WeightGradientArgs& args, Stream stream) {
  const WeightPlan plan = plan_of(args);
  const Error error = with_math(args.dtype, args.tf32,
                                [&]<class T, bool kTf32>() { return launch_type<T, kTf32>(args, plan, stream); });
  if (error || plan.pieces == 1) return error;
  const std::int64_t size = args.grad_weight.data ? static_cast<std::int64_t>(args.features) * args.width : 0;
  const std::int64_t all = size + (args.grad_bias.data ? args.features : 0);
  return matrix_sum({.matrices = {args.partial, DType::float32},
                     .aligned = all % 4 == 0,
                     .count = plan.pieces,
                     .stride = plan.piece_size,
                     .width = all,
                     .first_size = size,
                     .first = {args.grad_weight.data, args.grad_weight.dtype},
                     .second = args.grad_bias},
                    stream);
}

Error scaled_gradient(const ScaledGradientArgs& args, Stream stream) {
  const std::int64_t grid = divide_up(args.rows, kGradientRows);
  return with_type(args.out.dtype, [&](auto example) {
    using T = decltype(example);
    if (args.grad.dtype == args.out.dtype)
      return launch(scaled_gradient_kernel<T, T>, grid, kGradientRows * 32, 0, stream, args);
    return launch(scaled_gradient_kernel<T, float>, grid, kGradientRows * 32, 0, stream, args);
  });
}

}  // namespace crossvit::cuda
