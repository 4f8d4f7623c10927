// layer_norm_linear: a block normalises a tile of rows in shared memory and multiplies it by column tiles of the weight, one
// behind the other through one ring, so that the copies for the next tile run under the last steps of this one.
#include "cuda/layer_norm_linear.h"

#include <algorithm>
#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/linear.h"
#include "cuda/math.cuh"
#include "cuda/norm.cuh"
#include "cuda/quad.cuh"
#include "cuda/tile.cuh"
#include "cuda/tile_load.cuh"

namespace crossvit::cuda {
namespace normalized_tiles {

// Shared memory of a block: the normalised rows, the ring, and what is either LayerNorm's parameters or staged results.
template <class P_, int kDepth_, int kStages_>
struct Fused {
  using P = P_;
  using T = typename P::T;
  static constexpr int kDepth = kDepth_, kStages = kStages_;
  static constexpr int kWeightStride = k_stride<T>(kDepth), kStage = P::kColumns * kWeightStride;
  __host__ __device__ static int x_stride(int width) { return k_stride<T>((width + kDepth - 1) / kDepth * kDepth); }
  static std::size_t shared(int width) {
    const std::size_t staging = std::max(P::template kStaging<T> * sizeof(T), 2 * width * sizeof(float));
    return (static_cast<std::size_t>(P::kRows) * x_stride(width) + kStages * kStage) * sizeof(T) + staging;
  }
};

// Normalises the rows of the tile in place; those of float32 beside 16-bit operands are read from memory.
template <class F>
__device__ __forceinline__ void normalize_tile(const LayerNormLinearArgs& p, typename F::T* tile, const float* affine,
                                               std::int64_t row0, bool in_place, bool saves) {
  using T = typename F::T;
  constexpr int kSize = Chunk<T>::kSize, kRowsAtOnce = F::P::kWarps * 32 / kLanesPerRow;
  const int stride = F::x_stride(p.width), depth = (p.width + F::kDepth - 1) / F::kDepth * F::kDepth;
  const int lane = threadIdx.x % kLanesPerRow;
#pragma unroll 1
  for (int r = threadIdx.x / kLanesPerRow; r < F::P::kRows; r += kRowsAtOnce) {
    T* row = tile + r * stride;
    const float* from = row_of<const float>(p.x, min(row0 + r, p.rows - 1));
    const auto read = [&](int column, float (&v)[kSize]) {
      if (in_place) {
        const Chunk<T> chunk = *reinterpret_cast<const Chunk<T>*>(row + column);
#pragma unroll
        for (int e = 0; e < kSize; e++) v[e] = to_float(chunk.at[e]);
      } else {
#pragma unroll
        for (int q = 0; q < kSize / 4; q++) {
          const Four<float> four = load_four(from, column + q * 4, p.width, p.x.aligned);
#pragma unroll
          for (int e = 0; e < 4; e++) v[q * 4 + e] = four.at[e];
        }
      }
    };
    const RowStatistics statistics =
        row_statistics<kSize>(p.width, p.norm.eps, in_place ? to_float(row[0]) : from[0], read);
    if (saves && lane == 0 && row0 + r < p.rows) {
      p.mean[row0 + r] = statistics.origin + statistics.shift;
      p.rstd[row0 + r] = statistics.rstd;
    }
    for (int column = lane * kSize; column < depth; column += kLanesPerRow * kSize) {
      Chunk<T> chunk;
      float v[kSize] = {};
      if (column < p.width) read(column, v);
#pragma unroll
      for (int e = 0; e < kSize; e++) {
        if (column + e < p.width) {
          v[e] = (v[e] - statistics.origin - statistics.shift) * statistics.rstd;
          v[e] = fmaf(v[e], affine[column + e], affine[p.width + column + e]);
          if (p.gelu_in) v[e] = gelu<T>(v[e]);
        } else {
          v[e] = 0;
        }
        chunk.at[e] = from_float<T>(v[e]);
      }
      *reinterpret_cast<Chunk<T>*>(row + column) = chunk;
    }
  }
}

// Which tile of the rows and which column tiles a block has: blocks before `whole` all of them; behind, `splits` blocks
// share a row tile, with `tiles_per_block` of the column tiles each.
struct Share {
  int whole = 0, splits = 1, tiles_per_block = 1;
};

// Without the bound of three blocks of float32 the compiler keeps to registers for more on sm_80, and spills.
template <class F>
__global__ void __launch_bounds__(F::P::kThreads, sizeof(typename F::T) == 4 ? 3 : 1)
    fused_kernel(const LayerNormLinearArgs p, const Share share) {
  using P = typename F::P;
  using T = typename F::T;
  const int x_stride = F::x_stride(p.width), steps_per_tile = (p.width + F::kDepth - 1) / F::kDepth;
  T* x = reinterpret_cast<T*>(ptx::shared_memory());
  T* ring = x + P::kRows * x_stride;
  T* staging = ring + F::kStages * F::kStage;
  float* affine = reinterpret_cast<float*>(staging);
  const int block = static_cast<int>(blockIdx.x), column_tiles = (p.features + P::kColumns - 1) / P::kColumns;
  int row_tile = block, tile0 = 0, tiles = column_tiles;
  if (block >= share.whole) {
    row_tile = share.whole + (block - share.whole) / share.splits;
    tile0 = (block - share.whole) % share.splits * share.tiles_per_block;
    tiles = min(share.tiles_per_block, column_tiles - tile0);
  }
  const std::int64_t row = static_cast<std::int64_t>(row_tile) * P::kRows;
  const int steps = tiles * steps_per_tile;

  const bool in_place = p.x.dtype == p.dtype;
  if (in_place) {
    for (int column = 0; column < p.width; column += F::kDepth)
      load_tile<T, P::kRows, F::kDepth, P::kThreads>(x + column, x_stride, p.x, row, p.rows, column, p.width);
  }
  ptx::commit_copies();
  int load_tile_index = tile0, load_k = 0;  // what the ring fetches next
  const auto load_step = [&](int stage, int) {
    load_tile<T, P::kColumns, F::kDepth, P::kThreads>(ring + stage * F::kStage, F::kWeightStride, p.weight,
                                                      load_tile_index * P::kColumns, p.features, load_k * F::kDepth,
                                                      p.width);
    if (++load_k == steps_per_tile) load_k = 0, load_tile_index++;
  };
  Ring<F::kStages>::start(steps, load_step);
  load_affine(affine, p.width, p.norm.weight, p.norm.bias);
  ptx::wait_copies<F::kStages - 1>();
  __syncthreads();
  normalize_tile<F>(p, x, affine, row, in_place, p.mean && tile0 == 0);

  P sum;
  int column = tile0 * P::kColumns, k = 0;
  const auto begin = [&]() {
    sum.fill([&](int c) { return p.bias.data && column + c < p.features ? load(p.bias, column + c) : 0.0f; });
  };
  const auto store = [&](const Rows& out) {
    sum.for_each_chunk(staging, [&](int r, int c, const Chunk<T>& chunk) {
      if (row + r < p.rows)
        store_chunk(static_cast<T*>(out.data) + (row + r) * out.row_stride, column + c, p.features, out.aligned, chunk);
    });
  };
  begin();
  Ring<F::kStages>::run(steps, load_step, [&](int stage, int) {
    sum.template multiply<F::kDepth>(x + k * F::kDepth, x_stride, ring + stage * F::kStage, F::kWeightStride);
    if (++k == steps_per_tile) {
      if (p.pre.data) store(p.pre);
      if (p.gelu_out) sum.for_each([](int, int, float& v0, float& v1) { v0 = gelu<T>(v0), v1 = gelu<T>(v1); });
      store(p.out);
      k = 0;
      column += P::kColumns;
      begin();
    }
  });
}

// The tiles of the fused kernel: for few rows; for a multiprocessor's worth; and the large ones, which read the weight
// seldom, two blocks beside each other where rows are narrow, one twice as wide else.
template <class T, bool kTf32>
using Few = Fused<Product<T, kTf32, 1, 4, 1, 1>, sizeof(T) == 2 ? 64 : 32, 4>;
template <class T>
using Medium = Fused<Product<T, false, 2, 2, 2, 4>, 64, 3>;
template <class T>
using Large = Fused<Product<T, false, 2, 2, 4, 8>, 32, 3>;
template <class T>
using Wide = Fused<Product<T, false, 2, 4, 4, 8>, 32, 3>;

struct Plan {
  enum Kind { few, medium, large, widest, in_two } kind = in_two;
  Share share;
};

// The plan of the least estimated time. Its unit: a multiply-add of a multiprocessor whose matrix units are busy. `slower`
// says how much of that a tile's instructions and its reads of shared memory and L2 leave. Where blocks are beside each
// other, one normalises while another multiplies. Row tiles that do not fill the machine once more share their columns.
Plan plan_of(const LayerNormLinearArgs& args) {
  if (args.dtype == DType::float32 && args.rows > 256) return {};
  const std::int64_t processors = multiprocessors(), limit = shared_memory_of_a_block();
  constexpr double kNormalize = 340, kStart = 2.7e6;  // of an element; of a block
  struct Candidate {
    Plan::Kind kind;
    int rows, columns, warps, most_resident;
    double slower;
    std::size_t shared;
  };
  using H = __half;
  const bool is_float = args.dtype == DType::float32;
  const Candidate candidates[] = {
      {Plan::few, 16, 32, 4, 6, 6,
       is_float ? Few<float, false>::shared(args.width) : Few<H, false>::shared(args.width)},
      {Plan::medium, 64, 64, 4, 4, 1.8, Medium<H>::shared(args.width)},
      {Plan::large, 128, 128, 4, 2, 1.1, Large<H>::shared(args.width)},
      {Plan::widest, 128, 256, 8, 1, 1.0, Wide<H>::shared(args.width)},
  };
  const double width = args.width;
  Plan best;
  double least = 0;
  if (args.rows > 256) {  // two launches: the rows through memory, then tiles of 128 x 128
    const std::int64_t tiles = ((args.rows + 127) / 128) * ((args.features + 127) / 128);
    const std::int64_t waves = (tiles + 2 * processors - 1) / (2 * processors);
    least =
        2 * kStart + args.rows * width / processors * 1.3 * kNormalize + waves * (kStart + 2 * 1.1 * 128 * 128 * width);
  }
  for (const Candidate& c : candidates) {
    if (static_cast<std::int64_t>(c.shared) > limit || (is_float && c.kind != Plan::few)) continue;
    const std::int64_t resident = std::min<std::int64_t>(c.most_resident, (limit + 1024) / (c.shared + 1024));
    const std::int64_t row_tiles = (args.rows + c.rows - 1) / c.rows;
    const int column_tiles = (args.features + c.columns - 1) / c.columns;
    // `blocks` with so many column tiles each.
    const auto time_of = [&](std::int64_t blocks, int tiles) {
      const std::int64_t beside = std::min(resident, (blocks + processors - 1) / processors);
      if (blocks == 0) return 0.0;
      const std::int64_t waves = (blocks + processors * beside - 1) / (processors * beside);
      const double hidden = beside > 1 ? 0.5 : 1, idle = beside * c.warps < 8 ? 1.3 : 1;
      const double block = c.rows * width * (hidden * kNormalize + idle * c.slower * c.columns * tiles);
      return waves * (hidden * kStart + beside * block);
    };
    const std::int64_t whole = row_tiles / (processors * resident) * (processors * resident);
    for (int splits = 1; splits <= column_tiles; splits++) {
      const int tiles = (column_tiles + splits - 1) / splits;
      if ((column_tiles + tiles - 1) / tiles != splits) continue;
      const double time = time_of(whole, column_tiles) + time_of((row_tiles - whole) * splits, tiles);
      if (least == 0 || time < least) least = time, best = {c.kind, {static_cast<int>(whole), splits, tiles}};
    }
  }
  return best;
}

template <class F>
Error launch_fused(const LayerNormLinearArgs& args, const Plan& plan, Stream stream) {
  const std::int64_t row_tiles = (args.rows + F::P::kRows - 1) / F::P::kRows;
  const std::int64_t blocks = plan.share.whole + (row_tiles - plan.share.whole) * plan.share.splits;
  return launch(fused_kernel<F>, blocks, F::P::kThreads, F::shared(args.width), stream, args, plan.share);
}

template <class T, bool kTf32>
Error launch_type(const LayerNormLinearArgs& args, Stream stream) {
  const Plan plan = plan_of(args);
  if constexpr (sizeof(T) == 2) {
    if (plan.kind == Plan::medium) return launch_fused<Medium<T>>(args, plan, stream);
    if (plan.kind == Plan::large) return launch_fused<Large<T>>(args, plan, stream);
    if (plan.kind == Plan::widest) return launch_fused<Wide<T>>(args, plan, stream);
  }
  return launch_fused<Few<T, kTf32>>(args, plan, stream);
}

}  // namespace normalized_tiles

using namespace normalized_tiles;

bool layer_norm_linear_in_two(const LayerNormLinearArgs& args) { return plan_of(args).kind == Plan::in_two; }

Error launch_layer_norm_linear(const LayerNormLinearArgs& args, Stream stream) {
  if (!args.normalized.data)
    return with_math(args.dtype, args.tf32, [&]<class T, bool kTf32>() { return launch_type<T, kTf32>(args, stream); });
  if (const Error error = layer_norm_rows(args, false, stream)) return error;
  return linear({.dtype = args.dtype,
                 .tf32 = args.tf32,
                 .transposed = false,
                 .x = args.normalized,
                 .weight = args.weight,
                 .rows = args.rows,
                 .depth = args.width,
                 .columns = args.features,
                 .epilogue = {.bias = args.bias, .pre = args.pre, .gelu = args.gelu_out, .out = args.out}},
                stream);
}

}  // namespace crossvit::cuda
