// Cuts patches out of images, as tiles of a matrix in shared memory: a row per patch, its pixels along it. Without a
// resize the pixels are copied, asynchronously where the images' type is the tile's and the pixels lie together; with one
// each pixel is interpolated where it is put.
#pragma once

#include <cuda/ptx.cuh>

#include <cstdint>

#include "cuda/patch_embed.h"
#include "cuda/types.cuh"

namespace crossvit::cuda {

// Where a patch is; one per row of a tile, in shared memory.
struct alignas(16) PatchRow {
  std::int64_t at = -1;  // the image's first element or, not resized, the patch's; -1: no such patch
  int y = 0, x = 0;      // of its first pixel, in the resized image
};

__device__ __forceinline__ PatchRow patch_row(const PatchImages& images, std::uint32_t m, std::uint32_t patches) {
  PatchRow row;
  if (m < patches) {
    const std::uint32_t image = m / images.per_image, n = m - image * images.per_image, line = n / images.per_row;
    row.y = static_cast<int>(line) * images.patch;
    row.x = static_cast<int>(n - line * images.per_row) * images.patch;
    row.at = image * images.batch_stride;
    if (!images.resize) row.at += row.y * images.row_stride + row.x * images.column_stride;
  }
  return row;
}

// A pixel of a patch.
struct Pixel {
  int channel, y, x;
};

__device__ __forceinline__ Pixel pixel_of(const PatchImages& images, int k) {
  const unsigned patch = images.patch, line = static_cast<unsigned>(k) / patch, channel = line / patch;
  return {static_cast<int>(channel), static_cast<int>(line - channel * patch), static_cast<int>(k - line * patch)};
}

// Where torch's bicubic interpolation (A = -0.75) looks for a pixel, four neighbours from `first` on (beyond the border:
// the border's), and the weights that it gives them.
struct alignas(16) Taps {
  float weight[4];
  int first;
};

__device__ __forceinline__ Taps cubic_taps(int at, float scale) {
  const auto inner = [](float x) { return (1.25f * x - 2.25f) * x * x + 1.0f; };
  const auto outer = [](float x) { return ((-0.75f * x + 3.75f) * x - 6.0f) * x + 3.0f; };
  const float source = fmaf(static_cast<float>(at) + 0.5f, scale, -0.5f), below = floorf(source), t = source - below;
  return {{outer(t + 1.0f), inner(t), inner(1.0f - t), outer(2.0f - t)}, static_cast<int>(below) - 1};
}

__device__ __forceinline__ int clamp(int x, int size) { return min(max(x, 0), size - 1); }

// A pixel of the resized images, rounded to the images' type: `plane` is a channel of an image.
template <class X>
__device__ __forceinline__ float resized_pixel(const PatchImages& images, const X* plane, const Taps& rows,
                                               const Taps& columns) {
  int at[4];  // 32 bits count along a row of pixels
#pragma unroll
  for (int j = 0; j < 4; j++) at[j] = clamp(columns.first + j, images.width) * static_cast<int>(images.column_stride);
  float value[4][4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const X* line = plane + clamp(rows.first + i, images.height) * images.row_stride;
#pragma unroll
    for (int j = 0; j < 4; j++) value[i][j] = to_float(line[at[j]]);
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float line = value[i][0] * columns.weight[0];
#pragma unroll
    for (int j = 1; j < 4; j++) line = fmaf(value[i][j], columns.weight[j], line);
    sum = i == 0 ? line * rows.weight[0] : fmaf(line, rows.weight[i], sum);
  }
  return to_float(from_float<X>(sum));
}

// Brings pixels [k, end) of the patches `rows` (kRows of them) into a tile (kRows, kWidth), by the kThreads threads of the
// block; the rest of the tile becomes zero.
template <class T, int kRows, int kWidth, int kThreads>
struct PatchTile {
  static __device__ __forceinline__ bool asynchronous(const PatchImages& images) {
    return !images.resize && images.piece != 0 && same(images);
  }

  // Begins to copy, where asynchronous().
  static __device__ __forceinline__ void copy(T* tile, int stride, const PatchImages& images, const PatchRow* rows,
                                              int k, int end) {
    if constexpr (sizeof(T) == 2) {
      if (images.piece == 8) {
        copy_pieces<8>(tile, stride, images, rows, k, end);
        return;
      }
    }
    copy_pieces<4>(tile, stride, images, rows, k, end);
  }

  // Otherwise.
  static __device__ __forceinline__ void fill(T* tile, int stride, const PatchImages& images, const PatchRow* rows,
                                              int k, int end) {
    if constexpr (sizeof(T) == 2) {
      if (!same(images)) {
        if (images.piece != 0 && !images.resize) {
          convert_pieces(tile, stride, images, rows, k, end);
        } else {
          fill_as<float>(tile, stride, images, rows, k, end);
        }
        return;
      }
    }
    fill_as<T>(tile, stride, images, rows, k, end);
  }

 private:
  static __device__ __forceinline__ bool same(const PatchImages& images) {
    return sizeof(T) == 4 || images.dtype != DType::float32;
  }

  // f(row, column, offset behind the patch's first pixel, inside) for pieces of kPiece pixels.
  template <int kPiece, class F>
  static __device__ __forceinline__ void for_each_piece(const PatchImages& images, int k, int end, F&& f) {
    constexpr int kPerRow = kWidth / kPiece;
    static_assert(kThreads % kPerRow == 0 && kRows % (kThreads / kPerRow) == 0);
    const int column = static_cast<int>(threadIdx.x) % kPerRow * kPiece,
              first = static_cast<int>(threadIdx.x) / kPerRow;
    const Pixel pixel = pixel_of(images, k + column);
    const std::int64_t offset =
        pixel.channel * images.channel_stride + pixel.y * images.row_stride + pixel.x * images.column_stride;
#pragma unroll
    for (int r = 0; r < kRows; r += kThreads / kPerRow) f(r + first, column, offset, k + column < end);
  }

  template <int kPiece>
  static __device__ __forceinline__ void copy_pieces(T* tile, int stride, const PatchImages& images,
                                                     const PatchRow* rows, int k, int end) {
    const T* data = static_cast<const T*>(images.data);
    for_each_piece<kPiece>(images, k, end, [&](int r, int column, std::int64_t offset, bool inside) {
      const std::int64_t at = rows[r].at;
      const bool exists = inside && at >= 0;
      const T* from = exists ? data + at + offset : data;
      if constexpr (kPiece * sizeof(T) == 16) {
        ptx::copy_async(tile + r * stride + column, from, exists ? 16 : 0);
      } else {
        ptx::copy_async_8(tile + r * stride + column, from, exists ? 8 : 0);
      }
    });
  }

  // From float32 to 16 bits; all reads are under way before the first is waited for.
  static __device__ __forceinline__ void convert_pieces(T* tile, int stride, const PatchImages& images,
                                                        const PatchRow* rows, int k, int end) {
    const float* data = static_cast<const float*>(images.data);
    for_each_piece<4>(images, k, end, [&](int r, int column, std::int64_t offset, bool inside) {
      const std::int64_t at = rows[r].at;
      float4 four = make_float4(0, 0, 0, 0);
      if (inside && at >= 0) four = __ldg(reinterpret_cast<const float4*>(data + at + offset));
      *reinterpret_cast<uint2*>(tile + r * stride + column) =
          make_uint2(pack<T>(four.x, four.y), pack<T>(four.z, four.w));
    });
  }

  template <class X>
  static __device__ __forceinline__ void fill_as(T* tile, int stride, const PatchImages& images, const PatchRow* rows,
                                                 int k, int end) {
    static_assert(kThreads % kWidth == 0);
    const int column = static_cast<int>(threadIdx.x) % kWidth;
    const Pixel pixel = pixel_of(images, k + column);
    const bool inside = k + column < end;
    const X* plane = static_cast<const X*>(images.data) + pixel.channel * images.channel_stride;
#pragma unroll 1
    for (int r = static_cast<int>(threadIdx.x) / kWidth; r < kRows; r += kThreads / kWidth) {
      const PatchRow row = rows[r];
      float value = 0;
      if (inside && row.at >= 0) {
        if (images.resize) {
          value = resized_pixel(images, plane + row.at, cubic_taps(row.y + pixel.y, images.row_scale),
                                cubic_taps(row.x + pixel.x, images.column_scale));
        } else {
          value = to_float(plane[row.at + pixel.y * images.row_stride + pixel.x * images.column_stride]);
        }
      }
      tile[r * stride + column] = from_float<T>(value);
    }
  }
};

// The steps of a product with patches, through a ring of kStages buffers with kStages - 1 steps in flight: load(step, buffer) begins
// to copy what is copied, cut_out(step, buffer) cuts out patches, multiply(step, buffer) reads a buffer, and done(step) may change
// what the step was loaded from. Half of the warps cut out patches while the others multiply.
template <int kStages, class Load, class CutOut, class Multiply, class Done>
__device__ __forceinline__ void stream_patches(int steps, Load&& load, CutOut&& cut_out, Multiply&& multiply,
                                               Done&& done) {
  const bool fills_first = threadIdx.x / 32 % 2 == 0;
  int stage = 0, next = 0;
#pragma unroll 1
  for (int step = 1 - kStages; step < steps; step++) {
    if (step >= 0) {
      ptx::wait_copies<kStages - 2>();
      __syncthreads();  // this step's operands are there, and everyone has left the buffer that is filled next
    }
    const int ahead = step + kStages - 1;
    if (ahead < steps) load(ahead, next);
    ptx::commit_copies();
#pragma unroll 1
    for (int part = 0; part < 2; part++) {
      if ((part == 0) == fills_first) {
        if (ahead < steps) cut_out(ahead, next);
      } else if (step >= 0) {
        multiply(step, stage);
      }
    }
    next = next + 1 == kStages ? 0 : next + 1;
    if (step < 0) continue;
    done(step);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
}

}  // namespace crossvit::cuda
