// The gradient of patch_embed's weight: the product of the gradient's columns and the pixels of the patches, summed over
// patches. A block takes a part of the weight and a piece of the patches, which it cuts out again.
#include <cuda/ptx.cuh>

#include <algorithm>
#include <type_traits>

#include "cuda/convert_load.cuh"
#include "cuda/launch.cuh"
#include "cuda/patch_embed.h"
#include "cuda/patch_gather.cuh"
#include "cuda/patch_resize.cuh"
#include "cuda/tile.cuh"

namespace crossvit::cuda {

template <class Product_, int kDepth_, int kStages_, bool kResize_>
struct PatchGradientTile {
  using Product = Product_;
  using T = Product::T;
  static constexpr bool kResize = kResize_;  // in two passes; otherwise pixel by pixel, if at all
  using Resizer = std::conditional_t<kResize, ResizedTile<T, kDepth_, Product::kThreads>, NoResize>;
  static constexpr int kDepth = kDepth_;  // patches of a step
  static constexpr int kStages = kStages_;
  static constexpr int kGradStride = transposed_stride(Product::kRows);
  static constexpr int kPixelStride = transposed_stride(Product::kColumns);
  static constexpr int kStage = kDepth * (kGradStride + kPixelStride);  // elements
  static constexpr int kShared =
      kStages * (kStage * static_cast<int>(sizeof(T)) + kDepth * static_cast<int>(sizeof(PatchRow)));
  static_assert(Product::template kStaging<float> * 4 <= kStages * kStage * static_cast<int>(sizeof(T)));

  static std::int64_t shared(const PatchImages& images) { return kShared + Resizer::shared(images); }

  // Whether the tile's columns are whole rows of pixels, several at a time.
  static bool takes(const PatchImages& images) {
    return resizes_in_two_passes(images) && Product::kColumns % (Resizer::kLines * images.patch) == 0 &&
           shared(images) <= shared_memory_of_a_block();
  }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::Product::kThreads, 1)
    patch_weight_gradient_kernel(const PatchWeightGradientArgs args) {
  using Product = Tile::Product;
  using T = Tile::T;
  constexpr int kRows = Product::kRows, kColumns = Product::kColumns, kThreads = Product::kThreads;
  constexpr int kStages = Tile::kStages, kDepth = Tile::kDepth;
  using Patches = PatchTile<T, kDepth, kColumns, kThreads>;
  const PatchImages& images = args.images;

  T* stages = reinterpret_cast<T*>(ptx::shared_memory());
  PatchRow* rows = reinterpret_cast<PatchRow*>(stages + kStages * Tile::kStage);  // kDepth of each stage

  // Blocks of the same patches follow each other.
  const unsigned column_tiles = (images.depth + kColumns - 1) / kColumns;
  const unsigned row_tiles = (args.features + kRows - 1) / kRows, tiles = row_tiles * column_tiles;
  const unsigned piece = blockIdx.x / tiles, tile = blockIdx.x - piece * tiles, row_tile = tile / column_tiles;
  const int feature = static_cast<int>(row_tile) * kRows;
  const int pixel = static_cast<int>(tile - row_tile * column_tiles) * kColumns;

  const std::int64_t all_steps = (static_cast<std::int64_t>(args.patches) + kDepth - 1) / kDepth;
  const std::int64_t first_step = all_steps * piece / args.pieces;
  const int steps = static_cast<int>(all_steps * (piece + 1) / args.pieces - first_step);
  const auto find_rows = [&](int step) {
    if (threadIdx.x < kDepth) {
      rows[step % kStages * kDepth + threadIdx.x] =
          patch_row(images, static_cast<std::uint32_t>((first_step + step) * kDepth) + threadIdx.x, args.patches);
    }
  };
  const bool asynchronous = !Tile::kResize && Patches::asynchronous(images);
  const typename Tile::Resizer resized(reinterpret_cast<unsigned char*>(rows + kStages * kDepth), images);
  const auto cut_out = [&](T* pixels, const PatchRow* found) {
    if constexpr (Tile::kResize) {
#pragma unroll 1
      for (int c = 0; c < min(kColumns, images.depth - pixel); c += Tile::Resizer::kLines * images.patch) {
        resized.fill(pixels + c, Tile::kPixelStride, images, found, pixel + c);
      }
    } else {
      Patches::fill(pixels, Tile::kPixelStride, images, found, pixel, images.depth);
    }
  };

#pragma unroll 1
  for (int step = 0; step < kStages; step++) find_rows(step);
  __syncthreads();

  Product sum;
  sum.clear();
  stream_patches<kStages>(
      steps,
      [&](int step, int buffer) {
        T* grad = stages + buffer * Tile::kStage;
        load_tile_as<T, kDepth, kRows, kThreads>(grad, Tile::kGradStride, args.grad, (first_step + step) * kDepth,
                                                 args.patches, feature, args.features);
        if (asynchronous)
          Patches::copy(grad + kDepth * Tile::kGradStride, Tile::kPixelStride, images, rows + buffer * kDepth, pixel,
                        images.depth);
      },
      [&](int, int buffer) {
        if (!asynchronous) cut_out(stages + buffer * Tile::kStage + kDepth * Tile::kGradStride, rows + buffer * kDepth);
      },
      [&](int, int buffer) {
        const T* grad = stages + buffer * Tile::kStage;
        sum.template multiply<kDepth, true, true>(grad, Tile::kGradStride, grad + kDepth * Tile::kGradStride,
                                                  Tile::kPixelStride);
      },
      // In the place of this step's rows, which have been used; read behind the next barrier.
      [&](int step) { find_rows(step + kStages); });

  __syncthreads();
  float* partial = args.partial + static_cast<std::int64_t>(piece) * args.features * images.depth;
  sum.template for_each_chunk<float>(reinterpret_cast<float*>(stages), [&](int r, int c, const Chunk<float>& chunk) {
    if (feature + r < args.features) {
      store_chunk(partial + static_cast<std::int64_t>(feature + r) * images.depth, pixel + c, images.depth,
                  images.depth % 4 == 0, chunk);
    }
  });
}

namespace {

template <class Tile>
std::int64_t tiles_of(const PatchWeightGradientArgs& args) {
  using Product = Tile::Product;
  return divide_up(args.features, Product::kRows) * divide_up(args.images.depth, Product::kColumns);
}

// f(a tile), which is resized in two passes if it can be.
template <class Product, int kDepth, class F>
auto with_product(const PatchWeightGradientArgs& args, F&& f) {
  using Resized = PatchGradientTile<Product, kDepth, 4, true>;
  if (Resized::takes(args.images)) return f(Resized());
  return f(PatchGradientTile<Product, kDepth, 4, false>());
}

template <class F>
auto with_tile(const PatchWeightGradientArgs& args, F&& f) {
  // The narrow tile where that saves more products than cutting out the patches again costs.
  const int gather = args.images.resize ? 384 : 64;
  const std::int64_t by_192 = divide_up(args.features, 192) * (192 + gather);
  const std::int64_t by_96 = divide_up(args.features, 96) * (96 + gather);
  return with_math(args.dtype, args.tf32, [&]<class T, bool kTf32>() {
    if constexpr (sizeof(T) == 4) {
      return with_product<Product<T, kTf32, 2, 4, 3, 4>, 16>(args, f);
    } else {
      if (by_96 < by_192) return with_product<Product<T, false, 2, 4, 3, 4>, 32>(args, f);
      return with_product<Product<T, false, 2, 4, 6, 4>, 32>(args, f);
    }
  });
}

}  // namespace

int patch_weight_gradient_pieces(const PatchWeightGradientArgs& args) {
  return with_tile(args, [&](auto tile) {
    using Tile = decltype(tile);
    const std::int64_t steps = divide_up(args.patches, Tile::kDepth);
    const std::int64_t pieces = std::min(multiprocessors() / tiles_of<Tile>(args), steps / 4);
    return static_cast<int>(std::max<std::int64_t>(pieces, 1));
  });
}

Error launch_patch_weight_gradient(const PatchWeightGradientArgs& args, Stream stream) {
  return with_tile(args, [&](auto tile) {
    using Tile = decltype(tile);
    return launch(patch_weight_gradient_kernel<Tile>, tiles_of<Tile>(args) * args.pieces, Tile::Product::kThreads,
                  Tile::shared(args.images), stream, args);
  });
}

}  // namespace crossvit::cuda
