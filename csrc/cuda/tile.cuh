// A block's product of two tiles in shared memory, by the same warps and into the same registers for every arithmetic:
// 16-bit and TF32 matrix instructions, and IEEE float32.
//
// Operands in shared memory are rows of elements of T, 16-byte aligned, `stride` elements apart:
//     K-major     a row per row of A or column of B, k along it        stride = k_stride<T>(depth)
//     transposed  a row per k, the rows of A or columns of B along it  stride = transposed_stride(columns)
// The strides leave a gap behind every row, so that the eight rows that are read at once begin in different banks.
//
//     Product<T, kTf32, ...> sum;
//     sum.clear();
//     sum.multiply<32>(a, a_stride, b, b_stride);                     // A and B K-major: x weight^T
//     sum.multiply<32, false, true>(a, a_stride, b, b_stride);        // B transposed: grad weight
//     sum.multiply<32, true, true>(a, a_stride, b, b_stride);         // both transposed: grad^T x
//     sum.for_each([&](int row, int column, float& v0, float& v1) {...});    // of the tile: (row, column), (row, column + 1)
//     sum.for_each_chunk(staging, [&](int row, int column, const Chunk<S>& chunk) {...});     // 16 bytes at once
//
// tile_load.cuh brings the operands there.
#pragma once

#include <cuda/ptx.cuh>

#include <cstdint>

#include "cuda/types.cuh"

namespace crossvit::cuda {

// Between K-major rows of `depth` elements, a multiple of 32 bytes.
template <class T>
__host__ __device__ constexpr int k_stride(int depth) {
  return depth + 16 / static_cast<int>(sizeof(T));
}

// Between the rows of a transposed operand with `columns` elements, a multiple of 32 bytes.
__host__ __device__ constexpr int transposed_stride(int columns) { return columns + 8; }

// Sums of a tile (kRows, kColumns) in the registers of kThreads threads: kRowWarps x kColumnWarps warps, each with kM * 16
// rows and kN * 8 columns in the layout of m16n8 fragments. kTf32 is for T = float only.
template <class T_, bool kTf32, int kRowWarps, int kColumnWarps, int kM, int kN>
struct Product {
  using T = T_;
  static constexpr int kRows = kRowWarps * kM * 16;
  static constexpr int kColumns = kColumnWarps * kN * 8;
  static constexpr int kWarps = kRowWarps * kColumnWarps;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kStep = sizeof(T) == 2 ? 16 : 8;  // depths are multiples of this

  // at[i][j][2 h + c] is row i * 16 + h * 8 + group, column j * 8 + 2 * pair + c of the warp's part.
  float at[kM][kN][4];

  // Every sum of a column begins with f(column), called for this thread's columns of the tile.
  template <class F>
  __device__ __forceinline__ void fill(F&& f) {
    const int column = warp_column() + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int j = 0; j < kN; j++) {
      const float first = f(column + j * 8), second = f(column + j * 8 + 1);
#pragma unroll
      for (int i = 0; i < kM; i++) {
        at[i][j][0] = at[i][j][2] = first;
        at[i][j][1] = at[i][j][3] = second;
      }
    }
  }

  __device__ __forceinline__ void clear() {
    fill([](int) { return 0.0f; });
  }

  // The first row and column of this warp's part of the tile.
  static __device__ __forceinline__ int warp_row() {
    return static_cast<int>(threadIdx.x) / 32 / kColumnWarps * (kM * 16);
  }
  static __device__ __forceinline__ int warp_column() {
    return static_cast<int>(threadIdx.x) / 32 % kColumnWarps * (kN * 8);
  }

  // Adds the product of a (kRows, kDepth) and b (kDepth, kColumns); called by all threads. IEEE float32 sums kDepth
  // products apart before it adds them, as errors of short sums are smaller than those of one long one.
  template <int kDepth, bool kTransposedA = false, bool kTransposedB = false>
  __device__ __forceinline__ void multiply(const T* a, int a_stride, const T* b, int b_stride) {
    static_assert(kDepth % kStep == 0);
    a += kTransposedA ? warp_row() : warp_row() * a_stride;
    b += kTransposedB ? warp_column() : warp_column() * b_stride;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int k = 0; k < kDepth; k += kStep) multiply16<kTransposedA, kTransposedB>(a, a_stride, b, b_stride, k);
    } else if constexpr (kTf32) {
#pragma unroll
      for (int k = 0; k < kDepth; k += kStep) multiply_tf32<kTransposedA, kTransposedB>(a, a_stride, b, b_stride, k);
    } else {
      Product part;
      part.clear();
#pragma unroll 2
      for (int k = 0; k < kDepth; k += 4)
        part.template multiply_ieee<kTransposedA, kTransposedB>(a, a_stride, b, b_stride, k);
#pragma unroll
      for (int i = 0; i < kM; i++) {
#pragma unroll
        for (int j = 0; j < kN; j++) {
#pragma unroll
          for (int e = 0; e < 4; e++) at[i][j][e] += part.at[i][j][e];
        }
      }
    }
  }

  // f(row, column, v0, v1) for this thread's sums: v0 at (row, column) of the tile and v1 beside it, both by reference.
  template <class F>
  __device__ __forceinline__ void for_each(F&& f) {
    const int lane = threadIdx.x % 32;
    const int row = warp_row() + lane / 4, column = warp_column() + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kM; i++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int j = 0; j < kN; j++) f(row + i * 16 + h * 8, column + j * 8, at[i][j][2 * h], at[i][j][2 * h + 1]);
      }
    }
  }

  // Elements of S that for_each_chunk needs in shared memory, for the whole block.
  template <class S>
  static constexpr int kStaging = kWarps * 16 * (kN * 8 + 8);

  // f(row, column, chunk) for 16 bytes of the tile as S, beginning at (row, column), chunks of a row by adjacent lanes.
  // `staging` holds kStaging<S> elements that nobody else uses meanwhile; warps do not wait for each other. f is in the
  // code for kAtOnce chunks (or fewer, of which a warp's 16 rows have a multiple) of every 16 rows.
  template <class S, int kAtOnce = 2, class F>
  __device__ __forceinline__ void for_each_chunk(S* staging, F&& f) const {
    for_each_chunk<S, kAtOnce>(
        staging, [](int, int) { return 0; },
        [&](int row, int column, const Chunk<S>& chunk, int) { f(row, column, chunk); });
  }

  // f(row, column, chunk, before(row, column)); before() may load what f needs, it is called for kAtOnce chunks ahead.
  template <class S, int kAtOnce = 2, class Before, class F>
  __device__ __forceinline__ void for_each_chunk(S* staging, Before&& before, F&& f) const {
    constexpr int kStride = kN * 8 + 8, kPerRow = kN * 8 / Chunk<S>::kSize, kChunks = (16 * kPerRow + 31) / 32;
    constexpr int kGroup = divisor(kChunks, kAtOnce);
    const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    staging += static_cast<int>(threadIdx.x) / 32 * (16 * kStride);
#pragma unroll
    for (int i = 0; i < kM; i++) {
      decltype(before(0, 0)) given[kGroup];
      const auto load_given = [&](int first) {
#pragma unroll
        for (int c = 0; c < kGroup; c++) {
          const int at = (first + c) * 32 + lane, row = at / kPerRow, column = at % kPerRow * Chunk<S>::kSize;
          if (16 * kPerRow % 32 == 0 || row < 16) given[c] = before(warp_row() + i * 16 + row, warp_column() + column);
        }
      };
      load_given(0);
      __syncwarp();
#pragma unroll
      for (int j = 0; j < kN; j++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          S* to = staging + (group + h * 8) * kStride + j * 8 + pair * 2;
          if constexpr (sizeof(S) == 2) {
            *reinterpret_cast<std::uint32_t*>(to) = pack<S>(at[i][j][2 * h], at[i][j][2 * h + 1]);
          } else {
            *reinterpret_cast<float2*>(to) = make_float2(at[i][j][2 * h], at[i][j][2 * h + 1]);
          }
        }
      }
      __syncwarp();
#pragma unroll 1
      for (int first = 0; first < kChunks; first += kGroup) {
        if (first > 0) load_given(first);
#pragma unroll
        for (int c = 0; c < kGroup; c++) {
          const int at = (first + c) * 32 + lane, row = at / kPerRow, column = at % kPerRow * Chunk<S>::kSize;
          if (16 * kPerRow % 32 == 0 || row < 16) {
            f(warp_row() + i * 16 + row, warp_column() + column,
              *reinterpret_cast<const Chunk<S>*>(staging + row * kStride + column), given[c]);
          }
        }
      }
    }
  }

 private:
  // The largest divisor of n that is at most `most`.
  static constexpr int divisor(int n, int most) { return n % most == 0 ? most : divisor(n, most - 1); }

  template <class, bool, int, int, int, int>
  friend struct Product;

  template <bool kTransposedA, bool kTransposedB>
  __device__ __forceinline__ void multiply16(const T* a, int a_stride, const T* b, int b_stride, int k) {
    const int lane = threadIdx.x % 32;
    std::uint32_t fragment[kM][4];
#pragma unroll
    for (int i = 0; i < kM; i++) {
      if constexpr (kTransposedA) {
        ptx::load_matrices_transposed(fragment[i],
                                      a + (k + lane % 8 + lane / 16 * 8) * a_stride + i * 16 + lane / 8 % 2 * 8);
      } else {
        ptx::load_matrices(fragment[i], a + (i * 16 + lane % 16) * a_stride + k + lane / 16 * 8);
      }
    }
#pragma unroll
    for (int j = 0; j + 1 < kN; j += 2) {
      std::uint32_t two[4];
      if constexpr (kTransposedB) {
        ptx::load_matrices_transposed(two, b + (k + lane % 16) * b_stride + j * 8 + lane / 16 * 8);
      } else {
        ptx::load_matrices(two, b + (j * 8 + lane % 8 + lane / 16 * 8) * b_stride + k + lane / 8 % 2 * 8);
      }
      const std::uint32_t first[2] = {two[0], two[1]}, second[2] = {two[2], two[3]};
#pragma unroll
      for (int i = 0; i < kM; i++) {
        ptx::multiply(T(), at[i][j], fragment[i], first);
        ptx::multiply(T(), at[i][j + 1], fragment[i], second);
      }
    }
    if constexpr (kN % 2 == 1) {
      std::uint32_t last[2];
      if constexpr (kTransposedB) {
        ptx::load_matrices_transposed(last, b + (k + lane % 16) * b_stride + (kN - 1) * 8);
      } else {
        ptx::load_matrices(last, b + ((kN - 1) * 8 + lane % 8) * b_stride + k + lane / 8 % 2 * 8);
      }
#pragma unroll
      for (int i = 0; i < kM; i++) ptx::multiply(T(), at[i][kN - 1], fragment[i], last);
    }
  }

  template <bool kTransposedA, bool kTransposedB>
  __device__ __forceinline__ void multiply_tf32(const T* a, int a_stride, const T* b, int b_stride, int k) {
    const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    std::uint32_t fragment[kM][4];
#pragma unroll
    for (int i = 0; i < kM; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int row = i * 16 + group + e % 2 * 8, depth = k + pair + e / 2 * 4;
        fragment[i][e] = ptx::round_to_tf32(a[kTransposedA ? depth * a_stride + row : row * a_stride + depth]);
      }
    }
#pragma unroll
    for (int j = 0; j < kN; j++) {
      std::uint32_t other[2];
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int column = j * 8 + group, depth = k + pair + e * 4;
        other[e] = ptx::round_to_tf32(b[kTransposedB ? depth * b_stride + column : column * b_stride + depth]);
      }
#pragma unroll
      for (int i = 0; i < kM; i++) ptx::multiply_tf32(at[i][j], fragment[i], other);
    }
  }

  // Four steps of k on the CUDA cores, by the thread that owns the sum.
  template <bool kTransposedA, bool kTransposedB>
  __device__ __forceinline__ void multiply_ieee(const T* a, int a_stride, const T* b, int b_stride, int k) {
    const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    float rows[kM * 2][4];
#pragma unroll
    for (int i = 0; i < kM * 2; i++) {
      if constexpr (kTransposedA) {
#pragma unroll
        for (int q = 0; q < 4; q++) rows[i][q] = a[(k + q) * a_stride + i * 8 + group];
      } else {
        const float4 four = *reinterpret_cast<const float4*>(a + (i * 8 + group) * a_stride + k);
        rows[i][0] = four.x, rows[i][1] = four.y, rows[i][2] = four.z, rows[i][3] = four.w;
      }
    }
#pragma unroll
    for (int j = 0; j < kN; j++) {
      float columns[2][4];
      if constexpr (kTransposedB) {
#pragma unroll
        for (int q = 0; q < 4; q++) {
          const float2 two = *reinterpret_cast<const float2*>(b + (k + q) * b_stride + j * 8 + pair * 2);
          columns[0][q] = two.x, columns[1][q] = two.y;
        }
      } else {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const float4 four = *reinterpret_cast<const float4*>(b + (j * 8 + pair * 2 + c) * b_stride + k);
          columns[c][0] = four.x, columns[c][1] = four.y, columns[c][2] = four.z, columns[c][3] = four.w;
        }
      }
#pragma unroll
      for (int i = 0; i < kM * 2; i++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          float& sum = at[i / 2][j][i % 2 * 2 + c];
#pragma unroll
          for (int q = 0; q < 4; q++) sum = fmaf(rows[i][q], columns[c][q], sum);
        }
      }
    }
  }
};

}  // namespace crossvit::cuda
