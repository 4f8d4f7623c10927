// The interpolation of a tile of patches in two passes, in shared memory. A warp resizes its own patches, kLines rows of
// pixels at a time: first along the columns of the image, four neighbouring columns a lane, then along the rows. A pixel so
// costs 4 + 4 multiplications (and those of the columns between patches) where each on its own would cost 16 + 4, and reads
// of 8 or 16 bytes where each would make 16.
#pragma once

#include <cstdint>

#include "cuda/patch_embed.h"
#include "cuda/patch_gather.cuh"

namespace crossvit::cuda {

// For images whose rows can be read four pixels at once (PatchImages::piece) and small patches, of a multiple of 4 pixels a
// side.
inline bool resizes_in_two_passes(const PatchImages& images) {
  constexpr int kMostPatch = 16, kMostScale = 12;  // the small products of ResizedTile stay exact
  return images.resize && images.piece != 0 && images.patch <= kMostPatch && images.column_scale <= kMostScale &&
         images.height * images.row_stride < std::int64_t{1} << 31;
}

// In the place of a ResizedTile, where nothing is resized in two passes.
struct NoResize {
  static std::int64_t shared(const PatchImages&) { return 0; }
  __device__ __forceinline__ NoResize(unsigned char*, const PatchImages&) {}
};

// A tile (kRows, kLines * patch) by kThreads threads.
template <class T, int kRows, int kThreads>
struct ResizedTile {
  static constexpr int kLines = sizeof(T) == 2 ? 4 : 2;
  static constexpr int kPatches = kRows / (kThreads / 32);  // of a warp

  struct alignas(4 * kLines) Lines {
    float at[kLines];
  };

  // Quads of columns that a patch's taps may meet; they begin at a multiple of four.
  static __host__ __device__ int quads(const PatchImages& images) {
    const int columns = static_cast<int>(static_cast<float>(images.patch - 1) * images.column_scale + 0.999f) + 4;
    return (columns + 3 + 3) / 4;
  }

  // Bytes of shared memory, 16-byte aligned.
  static std::int64_t shared(const PatchImages& images) {
    const std::int64_t taps = images.resized_height + images.resized_width;
    return (taps * 20 + 15) / 16 * 16 + std::int64_t{kRows} * quads(images) * 4 * sizeof(Lines);
  }

  float4* weights;  // of the rows' taps, then of the columns'
  int* first;
  Lines* buffer;                // of this warp: (kPatches, quads, 4), the four in an order that meets different banks
  int per_patch;                // quads
  unsigned by_quads, by_patch;  // x / y = x * by_y >> 16, for small x

  // Called by all threads; a barrier before the first fill().
  __device__ __forceinline__ ResizedTile(unsigned char* memory, const PatchImages& images) {
    const int taps = images.resized_height + images.resized_width;
    weights = reinterpret_cast<float4*>(memory);
    first = reinterpret_cast<int*>(weights + taps);
    for (int i = threadIdx.x; i < taps; i += kThreads) {
      const int column = i - images.resized_height;
      const Taps of = column < 0 ? cubic_taps(i, images.row_scale) : cubic_taps(column, images.column_scale);
      weights[i] = make_float4(of.weight[0], of.weight[1], of.weight[2], of.weight[3]);
      first[i] = of.first;
    }
    per_patch = quads(images);
    by_quads = 65536u / static_cast<unsigned>(per_patch) + 1;
    by_patch = 65536u / static_cast<unsigned>(images.patch) + 1;
    buffer = reinterpret_cast<Lines*>(memory + (taps * 20 + 15) / 16 * 16) +
             static_cast<int>(threadIdx.x) / 32 * (kPatches * per_patch * 4);
  }

  // Pixels [k, k + kLines * patch) of the patches `rows`; k is a multiple of that.
  __device__ __forceinline__ void fill(T* tile, int stride, const PatchImages& images, const PatchRow* rows,
                                       int k) const {
    if constexpr (sizeof(T) == 2) {
      if (images.dtype == DType::float32) {
        fill_as<float>(tile, stride, images, rows, k);
        return;
      }
    }
    fill_as<T>(tile, stride, images, rows, k);
  }

 private:
  template <class X>
  struct alignas(4 * sizeof(X)) Four {
    X at[4];
  };

  // The first column that is kept of a patch that begins at column x of the resized image.
  __device__ __forceinline__ int base(const PatchImages& images, int x) const {
    return max(first[images.resized_height + x], 0) & ~3;
  }

  template <class X>
  __device__ __forceinline__ void fill_as(T* tile, int stride, const PatchImages& images, const PatchRow* rows,
                                          int k) const {
    const int lane = threadIdx.x % 32, first_row = static_cast<int>(threadIdx.x) / 32 * kPatches;
    const int patch = images.patch, line = k / patch, channel = line / patch, py = line - channel * patch;
    const float4* column_weights = weights + images.resized_height;
    const int* column_first = first + images.resized_height;
    rows += first_row;
    tile += first_row * stride;

    __syncwarp();  // the last pixels have been read
#pragma unroll 1
    for (int item = lane; item < kPatches * per_patch; item += 32) {
      const int p = static_cast<int>(item * by_quads >> 16), g = item - p * per_patch;
      const PatchRow row = rows[p];
      if (row.at < 0) continue;
      const int column = base(images, row.x) + 4 * g;
      if (column > min(column_first[row.x + patch - 1] + 3, images.width - 1)) continue;
      const X* from = static_cast<const X*>(images.data) + row.at + channel * images.channel_stride + column;
      const bool whole = column + 4 <= images.width;
#pragma unroll 1
      for (int l = 0; l < kLines; l += 2) {  // two at a time: registers for eight reads under way
        float sum[2][4];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float4 four = weights[row.y + py + l + h];
          const float weight[4] = {four.x, four.y, four.z, four.w};
          const int y = first[row.y + py + l + h];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const X* pixels = from + clamp(y + i, images.height) * static_cast<int>(images.row_stride);
            Four<X> value;
            if (whole) {
              value = *reinterpret_cast<const Four<X>*>(pixels);
            } else {
#pragma unroll
              for (int j = 0; j < 4; j++) value.at[j] = pixels[min(j, images.width - 1 - column)];
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
              sum[h][j] =
                  i == 0 ? to_float(value.at[j]) * weight[0] : fmaf(to_float(value.at[j]), weight[i], sum[h][j]);
            }
          }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
          *reinterpret_cast<float2*>(buffer[item * 4 + (j ^ (g >> 1 & 3))].at + l) = make_float2(sum[0][j], sum[1][j]);
        }
      }
    }
    __syncwarp();

#pragma unroll 1
    for (int e = lane; e < kPatches * patch; e += 32) {
      const int p = static_cast<int>(e * by_patch >> 16), px = e - p * patch;
      const PatchRow row = rows[p];
      Lines sum{};
      if (row.at >= 0) {
        const float4 four = column_weights[row.x + px];
        const float weight[4] = {four.x, four.y, four.z, four.w};
        const int x = column_first[row.x + px], begin = base(images, row.x);
        const Lines* lines = buffer + p * per_patch * 4;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int column = clamp(x + i, images.width) - begin;
          const Lines value = lines[(column & ~3) + ((column ^ column >> 3) & 3)];
#pragma unroll
          for (int l = 0; l < kLines; l++) {
            sum.at[l] = i == 0 ? value.at[l] * weight[0] : fmaf(value.at[l], weight[i], sum.at[l]);
          }
        }
      }
      // Rounded to the images' type, as torch's resized images are, before it becomes an operand.
#pragma unroll
      for (int l = 0; l < kLines; l++) {
        tile[p * stride + l * patch + px] = from_float<T>(to_float(from_float<X>(sum.at[l])));
      }
    }
  }
};

}  // namespace crossvit::cuda
