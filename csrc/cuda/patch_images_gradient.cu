// The gradient of patch_embed's images: the product of the gradient and the weight, whose every element is a pixel, since
// patches do not overlap; and the way back through a bicubic resize.
#include <cuda/ptx.cuh>

#include "cuda/convert_load.cuh"
#include "cuda/launch.cuh"
#include "cuda/patch_embed.h"
#include "cuda/patch_gather.cuh"
#include "cuda/tile.cuh"

namespace crossvit::cuda {

template <class Product_, int kDepth_, int kStages_>
struct PatchPixelTile {
  using Product = Product_;
  using T = Product::T;
  static constexpr int kDepth = kDepth_;  // features of a step
  static constexpr int kStages = kStages_;
  static constexpr int kGradStride = k_stride<T>(kDepth);
  static constexpr int kWeightStride = transposed_stride(Product::kColumns);
  static constexpr int kStage = Product::kRows * kGradStride + kDepth * kWeightStride;  // elements
  static constexpr int kShared =
      kStages * kStage * static_cast<int>(sizeof(T)) + Product::kRows * static_cast<int>(sizeof(PatchRow));
  static_assert(Product::template kStaging<float> * 4 <= kStages * kStage * static_cast<int>(sizeof(T)));
};

namespace {

// Four pixels of a patch, the first of which is pixel k.
template <class X>
__device__ __forceinline__ void store_pixels(const PatchImages& out, std::int64_t at, int k, const Chunk<float>& four) {
  X* to = static_cast<X*>(const_cast<void*>(out.data)) + at;
  const auto offset = [&](int i) {
    const Pixel pixel = pixel_of(out, i);
    return pixel.channel * out.channel_stride + pixel.y * out.row_stride + pixel.x;
  };
  if (out.piece != 0) {  // k is a multiple of 4, and so is the patch
    struct alignas(4 * sizeof(X)) Four {
      X at[4];
    };
    *reinterpret_cast<Four*>(to + offset(k)) = {from_float<X>(four.at[0]), from_float<X>(four.at[1]),
                                                from_float<X>(four.at[2]), from_float<X>(four.at[3])};
  } else {
#pragma unroll 1
    for (int e = 0; e < 4; e++) {
      const float value = e < 2 ? (e == 0 ? four.at[0] : four.at[1]) : (e == 2 ? four.at[2] : four.at[3]);
      if (k + e < out.depth) to[offset(k + e)] = from_float<X>(value);
    }
  }
}

}  // namespace

template <class Tile>
__global__ void __launch_bounds__(Tile::Product::kThreads)
    patch_images_gradient_kernel(const PatchImagesGradientArgs args) {
  using Product = Tile::Product;
  using T = Tile::T;
  constexpr int kRows = Product::kRows, kColumns = Product::kColumns, kThreads = Product::kThreads;
  constexpr int kStages = Tile::kStages, kDepth = Tile::kDepth;
  const PatchImages& out = args.out;

  T* stages = reinterpret_cast<T*>(ptx::shared_memory());
  PatchRow* rows = reinterpret_cast<PatchRow*>(stages + kStages * Tile::kStage);

  const unsigned column_tiles = (out.depth + kColumns - 1) / kColumns, row_tile = blockIdx.x / column_tiles;
  const std::uint32_t m = row_tile * kRows;
  const int pixel = static_cast<int>(blockIdx.x - row_tile * column_tiles) * kColumns;
  for (int r = threadIdx.x; r < kRows; r += kThreads) rows[r] = patch_row(out, m + r, args.patches);

  Product sum;
  sum.clear();
  const int steps = (args.features + kDepth - 1) / kDepth;
  const auto load = [&](int stage, int step) {
    T* grad = stages + stage * Tile::kStage;
    load_tile_as<T, kRows, kDepth, kThreads>(grad, Tile::kGradStride, args.grad, m, args.patches, step * kDepth,
                                             args.features);
    load_tile<T, kDepth, kColumns, kThreads>(grad + kRows * Tile::kGradStride, Tile::kWeightStride, args.weight,
                                             step * kDepth, args.features, pixel, out.depth);
  };
  Ring<kStages>::start(steps, load);
  Ring<kStages>::run(steps, load, [&](int stage, int) {
    const T* grad = stages + stage * Tile::kStage;
    sum.template multiply<kDepth, false, true>(grad, Tile::kGradStride, grad + kRows * Tile::kGradStride,
                                               Tile::kWeightStride);
  });

  __syncthreads();
  sum.template for_each_chunk<float, 1>(reinterpret_cast<float*>(stages), [&](int r, int c, const Chunk<float>& four) {
    const std::int64_t at = rows[r].at;
    if (at < 0 || pixel + c >= out.depth) return;
    if (out.dtype == DType::float32) {
      store_pixels<float>(out, at, pixel + c, four);
    } else if (out.dtype == DType::float16) {
      store_pixels<__half>(out, at, pixel + c, four);
    } else {
      store_pixels<__nv_bfloat16>(out, at, pixel + c, four);
    }
  });
}

// Each pixel gathers from the resized pixels whose taps meet it.
__global__ void __launch_bounds__(256) resize_gradient_kernel(const ResizeGradientArgs args, const float scale,
                                                              const float inverse_scale, const int candidates) {
  const std::int64_t element = static_cast<std::int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (element >= args.outer * args.size * args.inner) return;
  const std::int64_t line = element / args.inner, outer = line / args.size;
  const int at = static_cast<int>(line - outer * args.size);
  const float* grad = args.grad + outer * args.resized * args.inner + (element - line * args.inner);
  // Taps reach two pixels to either side; beyond a border they reach the border's pixel, which is no farther.
  const int first = static_cast<int>(floorf((static_cast<float>(at) - 1.5f) * inverse_scale - 0.5f)) - 1;
  float sum = 0;
  for (int candidate = max(first, 0); candidate < min(first + candidates, args.resized); candidate++) {
    const Taps taps = cubic_taps(candidate, scale);
    float weight = 0;
    bool meets = false;
#pragma unroll
    for (int t = 0; t < 4; t++) {
      const bool same = clamp(taps.first + t, args.size) == at;
      weight += same ? taps.weight[t] : 0.0f;
      meets = meets || same;
    }
    if (meets) sum = fmaf(grad[static_cast<std::int64_t>(candidate) * args.inner], weight, sum);
  }
  store(args.out, element, sum);
}

Error launch_patch_images_gradient(const PatchImagesGradientArgs& args, Stream stream) {
  return with_math(args.weight.dtype, args.tf32, [&]<class T, bool kTf32>() {
    constexpr bool kFloat = sizeof(T) == 4;
    using Tile = PatchPixelTile<Product<T, kTf32, 2, 4, kFloat ? 2 : 4, 4>, kFloat ? 16 : 32, 4>;
    using Product = typename Tile::Product;
    const auto tiles = divide_up(args.patches, Product::kRows) * divide_up(args.out.depth, Product::kColumns);
    return launch(patch_images_gradient_kernel<Tile>, tiles, Product::kThreads, Tile::kShared, stream, args);
  });
}

Error launch_resize_gradient(const ResizeGradientArgs& args, Stream stream) {
  const double scale = static_cast<double>(args.size) / args.resized;
  const std::int64_t total = args.outer * args.size * args.inner;
  // As many resized pixels as four of the images' cover, and those that rounding may add.
  const int candidates = static_cast<int>(4 / scale) + 5;
  return launch(resize_gradient_kernel, (total + 255) / 256, 256, 0, stream, args, static_cast<float>(scale),
                static_cast<float>(1 / scale), candidates);
}

}  // namespace crossvit::cuda
