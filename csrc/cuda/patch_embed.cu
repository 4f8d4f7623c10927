// patch_embed: a block cuts out its patches, step by step of their pixels, and multiplies them with the weight of all its
// columns; bias, positions and the CLS tokens' rows come behind the product.
#include "cuda/patch_embed.h"

#include <cuda/ptx.cuh>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/patch_gather.cuh"
#include "cuda/patch_resize.cuh"
#include "cuda/tile.cuh"
#include "cuda/tile_load.cuh"

namespace crossvit::cuda {

template <class Product_, int kDepth_, int kStages_, int kBlocks_, bool kResize_>
struct PatchForwardTile {
  using Product = Product_;
  using T = Product::T;
  using Resized = ResizedTile<T, Product::kRows, Product::kThreads>;
  using Resizer = std::conditional_t<kResize_, Resized, NoResize>;
  static constexpr bool kResize = kResize_;  // in two passes; otherwise pixel by pixel, if at all
  static constexpr int kDepth = kDepth_;     // pixels of a step, at most
  static constexpr int kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // on a multiprocessor
  static constexpr int kStride = k_stride<T>(kDepth);
  static constexpr int kStage = (Product::kRows + Product::kColumns) * kStride;  // elements
  static constexpr int kShared = kStages * kStage * static_cast<int>(sizeof(T)) +
                                 Product::kRows * static_cast<int>(sizeof(PatchRow) + sizeof(uint2)) +
                                 Product::kColumns * 4;
  static_assert(Product::template kStaging<T> <= kStages * kStage);

  static std::int64_t shared(const PatchImages& images) { return kShared + Resizer::shared(images); }
};

namespace {

// Elements of a vector from i on, as floats; those from `count` on are zero.
template <int kSize>
__device__ __forceinline__ void load_floats(float (&to)[kSize], const Vector& from, std::int64_t i, int count,
                                            bool aligned) {
  if (aligned && count >= kSize) {
    if (from.dtype == DType::float32) {
#pragma unroll
      for (int e = 0; e < kSize; e += 4) {
        const float4 four = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(from.data) + i + e));
        to[e] = four.x, to[e + 1] = four.y, to[e + 2] = four.z, to[e + 3] = four.w;
      }
      return;
    }
    if constexpr (kSize == 8) {
      if (from.dtype == DType::float16) {
        const auto chunk = *reinterpret_cast<const Chunk<__half>*>(static_cast<const __half*>(from.data) + i);
#pragma unroll
        for (int e = 0; e < 8; e++) to[e] = to_float(chunk.at[e]);
      } else {
        const auto chunk =
            *reinterpret_cast<const Chunk<__nv_bfloat16>*>(static_cast<const __nv_bfloat16*>(from.data) + i);
#pragma unroll
        for (int e = 0; e < 8; e++) to[e] = to_float(chunk.at[e]);
      }
      return;
    }
  }
#pragma unroll
  for (int e = 0; e < kSize; e++) to[e] = e < count ? load(from, i + e) : 0.0f;
}

template <class O, int kSize>
__device__ __forceinline__ void store_floats(O* to, const float (&value)[kSize], int count, bool aligned) {
#pragma unroll
  for (int first = 0; first < kSize; first += Chunk<O>::kSize) {
    Chunk<O> chunk;
#pragma unroll
    for (int e = 0; e < Chunk<O>::kSize; e++) {
      if (first + e < kSize) chunk.at[e] = from_float<O>(value[first + e]);
    }
    store_chunk(to, first, count, aligned, chunk);
  }
}

// Columns [first_column, end) of the CLS tokens' rows, each the one before its image's first patch, for the images whose first patch
// is among the kRows from m on; tokens[r].x is the row of patch m + r.
template <int kRows, int kThreads>
__device__ __forceinline__ void store_cls_tokens(const PatchEmbedArgs& args, std::uint32_t m, const uint2* tokens,
                                                 int first_column, int end) {
  const std::uint32_t per_image = args.images.per_image;
  std::uint32_t first = (per_image - m % per_image) % per_image;
#pragma unroll 1
  for (; first < kRows && m + first < args.patches; first += per_image) {
    const std::int64_t at = static_cast<std::int64_t>(tokens[first].x - 1) * args.features;
    for (int c = first_column + static_cast<int>(threadIdx.x); c < end; c += kThreads)
      store(args.out, at + c, load(args.cls, c) + load(args.position, c));
  }
}

}  // namespace

template <class Tile>
__global__ void __launch_bounds__(Tile::Product::kThreads, Tile::kBlocks)
    patch_embed_kernel(const PatchEmbedArgs args) {
  using Product = Tile::Product;
  using T = Tile::T;
  using Resized = Tile::Resized;
  using Patches = PatchTile<T, Product::kRows, Tile::kDepth, Product::kThreads>;
  constexpr int kRows = Product::kRows, kColumns = Product::kColumns, kThreads = Product::kThreads;
  constexpr int kStages = Tile::kStages, kStride = Tile::kStride, kDepth = Tile::kDepth;
  const PatchImages& images = args.images;

  T* stages = reinterpret_cast<T*>(ptx::shared_memory());
  PatchRow* rows = reinterpret_cast<PatchRow*>(stages + kStages * Tile::kStage);
  uint2* tokens = reinterpret_cast<uint2*>(rows + kRows);  // (row of out, row of position) of each patch
  float* bias = reinterpret_cast<float*>(tokens + kRows);

  // Blocks of the same patches follow each other, so that the pixels come from L2 but once.
  const unsigned column_tiles = (args.features + kColumns - 1) / kColumns;
  const unsigned row_tile = blockIdx.x / column_tiles;
  const std::uint32_t m = row_tile * kRows;
  const int column = static_cast<int>(blockIdx.x - row_tile * column_tiles) * kColumns;

  for (int r = threadIdx.x; r < kRows; r += kThreads) {
    rows[r] = patch_row(images, m + r, args.patches);
    const std::uint32_t image = (m + r) / images.per_image, n = m + r - image * images.per_image;
    tokens[r] = make_uint2(m + r + image + 1, n + 1);
  }
  for (int c = threadIdx.x; c < kColumns; c += kThreads) {
    bias[c] = args.bias.data != nullptr && column + c < args.features ? load(args.bias, column + c) : 0;
  }
  const typename Tile::Resizer resized(reinterpret_cast<unsigned char*>(bias + kColumns), images);
  __syncthreads();

  Product sum;
  sum.clear();
  const bool asynchronous = Patches::asynchronous(images);
  const int step_depth = Tile::kResize ? Resized::kLines * images.patch : kDepth;
  const int steps = (images.depth + step_depth - 1) / step_depth;
  const auto first_pixel = [&](int step) { return step * step_depth; };
  const auto last_pixel = [&](int step) { return min(images.depth, (step + 1) * step_depth); };
  stream_patches<kStages>(
      steps,
      [&](int step, int buffer) {
        T* filled = stages + buffer * Tile::kStage;
        const int k = first_pixel(step), end = last_pixel(step);
        load_tile<T, kColumns, kDepth, kThreads>(filled + kRows * kStride, kStride, args.weight, column, args.features,
                                                 k, end);
        if (!Tile::kResize && asynchronous) Patches::copy(filled, kStride, images, rows, k, end);
      },
      [&](int step, int buffer) {
        T* filled = stages + buffer * Tile::kStage;
        if constexpr (Tile::kResize) {
          resized.fill(filled, kStride, images, rows, first_pixel(step));
        } else {
          if (!asynchronous) Patches::fill(filled, kStride, images, rows, first_pixel(step), last_pixel(step));
        }
      },
      [&](int step, int buffer) {
        const T* a = stages + buffer * Tile::kStage;
        const T* b = a + kRows * kStride;
        const int depth = min(images.depth - step * step_depth, step_depth);
        if (sizeof(T) == 4 && (!Tile::kResize || depth == kDepth)) {
          sum.template multiply<kDepth>(a, kStride, b, kStride);
        } else {
#pragma unroll
          for (int d = 0; d < kDepth; d += Product::kStep) {
            if (d < depth) sum.template multiply<Product::kStep>(a + d, kStride, b + d, kStride);
          }
        }
      },
      [](int) {});

  sum.for_each([&](int, int c, float& v0, float& v1) {
    v0 += bias[c];
    v1 += bias[c + 1];
  });
  __syncthreads();
  const int features = args.features;
  sum.template for_each_chunk<T>(stages, [&](int r, int c, const Chunk<T>& chunk) {
    c += column;
    if (m + r >= args.patches || c >= features) return;
    const uint2 token = tokens[r];
    float value[Chunk<T>::kSize];
    load_floats(value, args.position, static_cast<std::int64_t>(token.y) * features + c, features - c, args.aligned);
#pragma unroll
    for (int e = 0; e < Chunk<T>::kSize; e++) value[e] += to_float(chunk.at[e]);
    const std::int64_t at = static_cast<std::int64_t>(token.x) * features + c;
    if (sizeof(T) == 4 || args.out.dtype == DType::float32) {
      store_floats(static_cast<float*>(args.out.data) + at, value, features - c, args.aligned);
    } else {
      store_floats(static_cast<T*>(args.out.data) + at, value, features - c, args.aligned);
    }
  });

  store_cls_tokens<kRows, kThreads>(args, m, tokens, column, min(column + kColumns, features));
}

namespace {

template <class Tile>
Error run(const PatchEmbedArgs& args, Stream stream) {
  using Product = Tile::Product;
  const auto tiles = divide_up(args.patches, Product::kRows) * divide_up(args.features, Product::kColumns);
  return launch(patch_embed_kernel<Tile>, tiles, Product::kThreads, Tile::shared(args.images), stream, args);
}

constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();

// The work of the busiest multiprocessor; kNever where the tile does not fit. The unit is a tenth of the products of 64
// patches and a column, on an H100: bringing a column of the weight from L2 takes as long as 17.
template <class Tile>
std::int64_t cost(const PatchEmbedArgs& args) {
  using Product = Tile::Product;
  const PatchImages& images = args.images;
  if (Tile::shared(images) > shared_memory_of_a_block()) return kNever;
  const int rows = Product::kRows / 64 * 10;
  // What it takes to cut out a patch, in columns: copied, interpolated in two passes, and pixel by pixel.
  const int gather = !images.resize ? 64 : Tile::kResize ? 384 : 1600;
  const std::int64_t tiles = divide_up(args.patches, Product::kRows) * divide_up(args.features, Product::kColumns);
  return divide_up(tiles, multiprocessors()) * (std::max(rows, 17) * Product::kColumns + rows * gather);
}

// Runs the cheapest of the tiles; false if none fits.
template <class... Tiles>
bool run_cheapest(const PatchEmbedArgs& args, Stream stream, Error& error) {
  const std::int64_t costs[sizeof...(Tiles)] = {cost<Tiles>(args)...};
  const std::int64_t* best = std::min_element(costs, costs + sizeof...(Tiles));
  int tile = 0;
  if (*best != kNever) ((costs + tile++ == best ? static_cast<void>(error = run<Tiles>(args, stream)) : void()), ...);
  return *best != kNever;
}

// Of 128 patches where copying them is cheap, as the weight is then read half as often; interpolated patches are best of
// use for all columns at once.
template <bool kResize>
bool run_typed(const PatchEmbedArgs& args, Stream stream, Error& error) {
  return with_math(args.weight.dtype, args.tf32, [&]<class T, bool kTf32>() {
    if constexpr (sizeof(T) == 4) {
      return run_cheapest<PatchForwardTile<Product<T, kTf32, 2, 4, 2, 6>, 32, 3, 1, kResize>,
                          PatchForwardTile<Product<T, kTf32, 2, 4, 2, 4>, 32, 3, 1, kResize>>(args, stream, error);
    } else if constexpr (kResize) {
      return run_cheapest<PatchForwardTile<Product<T, false, 2, 8, 2, 6>, 64, 2, 1, true>,
                          PatchForwardTile<Product<T, false, 2, 4, 2, 8>, 64, 2, 1, true>,
                          PatchForwardTile<Product<T, false, 2, 4, 2, 6>, 64, 2, 2, true>,
                          PatchForwardTile<Product<T, false, 2, 4, 2, 4>, 64, 2, 2, true>>(args, stream, error);
    } else {
      return run_cheapest<PatchForwardTile<Product<T, false, 4, 4, 2, 8>, 64, 2, 1, false>,
                          PatchForwardTile<Product<T, false, 4, 4, 2, 6>, 64, 3, 1, false>,
                          PatchForwardTile<Product<T, false, 4, 4, 2, 4>, 64, 3, 1, false>,
                          PatchForwardTile<Product<T, false, 2, 4, 2, 4>, 64, 3, 2, false>>(args, stream, error);
    }
  });
}

}  // namespace

Error launch_patch_embed(const PatchEmbedArgs& args, Stream stream) {
  Error error = nullptr;
  if (resizes_in_two_passes(args.images) && run_typed<true>(args, stream, error)) return error;
  run_typed<false>(args, stream, error);
  return error;
}

}  // namespace crossvit::cuda
