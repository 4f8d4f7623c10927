// Products of one warp, whose depth is known at run time, for kernels where every warp goes its own way (tile.cuh has
// those of a block). Sums are m16n8 fragments: d[0], d[1] are [group][2 pair, +1], d[2], d[3] [group + 8][2 pair, +1].
// Rows in shared memory are multiples of 16 bytes apart, an odd number of times where they are read eight at once.
#pragma once

#include <cuda/ptx.cuh>

#include <cstdint>

#include "cuda/types.cuh"

namespace crossvit::cuda {

// What a number leaves when it is rounded to T; an infinity leaves nothing.
template <class T>
__device__ __forceinline__ float remainder_of(float value, T rounded) {
  const float rest = value - to_float(rounded);
  return fabsf(rest) <= 3.4e38f ? rest : 0;
}

// Where a lane finds a 16 x 16 operand's rows for ldmatrix: of matrices 0 to 3, the second of them lies 8 rows further
// (down) or 8 columns further (across).
__device__ __forceinline__ int matrices_down(int stride) {
  const int lane = threadIdx.x % 32;
  return lane % 16 * stride + lane / 16 * 8;
}
__device__ __forceinline__ int matrices_across(int stride) {
  const int lane = threadIdx.x % 32;
  return (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8;
}

// The element of row `row` at `k` of an operand.
template <bool kTransposed>
__device__ __forceinline__ float element_of(const float* matrix, int stride, int row, int k) {
  return matrix[kTransposed ? k * stride + row : row * stride + k];
}

// Four elements of a row from k on.
template <bool kTransposed>
__device__ __forceinline__ void load_row(float (&to)[4], const float* matrix, int stride, int row, int k) {
  if constexpr (kTransposed) {
#pragma unroll
    for (int q = 0; q < 4; q++) to[q] = element_of<true>(matrix, stride, row, k + q);
  } else {
    const float4 four = *reinterpret_cast<const float4*>(matrix + row * stride + k);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  }
}

// multiply_warp() of 16-bit operands.
template <bool kTransposedA, bool kTransposedB, bool kHalf, class T, int kN>
__device__ __forceinline__ void multiply_warp16(float (&d)[kN][4], const T* a, int a_stride, const T* b, int b_stride,
                                                int depth) {
  const int lane = threadIdx.x % 32;
  a += kTransposedA ? matrices_across(a_stride)
       : kHalf      ? lane % 8 * a_stride + lane / 8 % 2 * 8
                    : matrices_down(a_stride);
  b += kTransposedB ? (kN == 1 ? lane % 16 * b_stride : matrices_down(b_stride))
                    : (kN == 1 ? lane % 8 * b_stride + lane / 8 % 2 * 8 : matrices_across(b_stride));
  const int a_step = kTransposedA ? 16 * a_stride : 16, b_step = kTransposedB ? 16 * b_stride : 16;
#pragma unroll 4
  for (int k = 0; k < depth; k += 16, a += a_step, b += b_step) {
    std::uint32_t rows[4] = {};
    if constexpr (kTransposedA) {
      ptx::load_matrices_transposed(rows, a);
    } else if constexpr (kHalf) {
      std::uint32_t half[2];
      ptx::load_matrices(half, a);
      rows[0] = half[0], rows[2] = half[1];
    } else {
      ptx::load_matrices(rows, a);
    }
    if constexpr (kN == 1) {
      std::uint32_t columns[2];
      kTransposedB ? ptx::load_matrices_transposed(columns, b) : ptx::load_matrices(columns, b);
      ptx::multiply(T(), d[0], rows, columns);
    } else {
#pragma unroll
      for (int j = 0; j < kN; j += 2) {
        std::uint32_t two[4];
        const T* at = b + j * 8 * (kTransposedB ? 1 : b_stride);
        kTransposedB ? ptx::load_matrices_transposed(two, at) : ptx::load_matrices(two, at);
        const std::uint32_t first[2] = {two[0], two[1]}, second[2] = {two[2], two[3]};
        ptx::multiply(T(), d[j], rows, first);
        ptx::multiply(T(), d[j + 1], rows, second);
      }
    }
  }
}

// multiply_warp() in TF32.
template <bool kTransposedA, bool kTransposedB, bool kHalf, int kN>
__device__ __forceinline__ void multiply_warp_tf32(float (&d)[kN][4], const float* a, int a_stride, const float* b,
                                                   int b_stride, int depth) {
  const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
#pragma unroll 4
  for (int k = 0; k < depth; k += 8) {
    std::uint32_t rows[4] = {};
#pragma unroll
    for (int e = 0; e < 4; e++) {
      if (kHalf && e % 2) continue;
      rows[e] = ptx::round_to_tf32(element_of<kTransposedA>(a, a_stride, group + e % 2 * 8, k + pair + e / 2 * 4));
    }
#pragma unroll
    for (int j = 0; j < kN; j++) {
      std::uint32_t columns[2];
#pragma unroll
      for (int e = 0; e < 2; e++)
        columns[e] = ptx::round_to_tf32(element_of<kTransposedB>(b, b_stride, j * 8 + group, k + pair + e * 4));
      ptx::multiply_tf32(d[j], rows, columns);
    }
  }
}

// multiply_warp() in IEEE float32.
template <bool kTransposedA, bool kTransposedB, bool kHalf, int kN>
__device__ __forceinline__ void multiply_warp_ieee(float (&d)[kN][4], const float* a, int a_stride, const float* b,
                                                   int b_stride, int depth) {
  const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
#pragma unroll 1
  for (int first = 0; first < depth; first += 32) {
    const int end = min(first + 32, depth);
    float part[kN][4] = {};
#pragma unroll 2
    for (int k = first; k < end; k += 4) {
      float rows[2][4];
#pragma unroll
      for (int i = 0; i < (kHalf ? 1 : 2); i++) load_row<kTransposedA>(rows[i], a, a_stride, group + i * 8, k);
#pragma unroll
      for (int j = 0; j < kN; j++) {
        float columns[2][4];
#pragma unroll
        for (int c = 0; c < 2; c++) load_row<kTransposedB>(columns[c], b, b_stride, j * 8 + pair * 2 + c, k);
#pragma unroll
        for (int q = 0; q < 4; q++) {
          part[j][0] = fmaf(rows[0][q], columns[0][q], part[j][0]);
          part[j][1] = fmaf(rows[0][q], columns[1][q], part[j][1]);
          if constexpr (!kHalf) {
            part[j][2] = fmaf(rows[1][q], columns[0][q], part[j][2]);
            part[j][3] = fmaf(rows[1][q], columns[1][q], part[j][3]);
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kN; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) d[j][e] += part[j][e];
  }
}

// d[j] (16, 8) += a (16, depth) b_j (depth, 8), b_j the j-th 8 columns of b; depth a multiple of 16. Operands lie K-major,
// a row for a row of a or a column of b, or kTransposed, a row for a k. kHalf: only 8 rows of a are there, the upper sums
// mean nothing. IEEE float32 sums 32 products apart before it adds them.
template <bool kTf32, bool kTransposedA, bool kTransposedB, bool kHalf = false, class T, int kN>
__device__ __forceinline__ void multiply_warp(float (&d)[kN][4], const T* a, int a_stride, const T* b, int b_stride,
                                              int depth) {
  static_assert(kN == 1 || kN % 2 == 0);
  if constexpr (sizeof(T) == 2) {
    multiply_warp16<kTransposedA, kTransposedB, kHalf>(d, a, a_stride, b, b_stride, depth);
  } else if constexpr (kTf32) {
    multiply_warp_tf32<kTransposedA, kTransposedB, kHalf>(d, a, a_stride, b, b_stride, depth);
  } else {
    multiply_warp_ieee<kTransposedA, kTransposedB, kHalf>(d, a, a_stride, b, b_stride, depth);
  }
}

// A small matrix (16 tokens, 8 kHeadGroups heads) in registers, as the right operand of a product over the tokens. It is made
// of sums (heads, tokens), s[i] the 8 tokens from 8 i on: no lane has to ask another one, except for IEEE float32.
template <class T, bool kTf32, int kHeadGroups>
struct TokenWeights {
  static constexpr bool kIeee = sizeof(T) == 4 && !kTf32;
  std::uint32_t packed[kHeadGroups][2];
  float spread[kIeee ? kHeadGroups : 1][kIeee ? 16 : 1][2];

  __device__ __forceinline__ explicit TokenWeights(const float (&s)[2][4]) {
#pragma unroll
    for (int g = 0; g < kHeadGroups; g++) {
      if constexpr (sizeof(T) == 2) {
        packed[g][0] = pack<T>(s[0][2 * g], s[0][2 * g + 1]);
        packed[g][1] = pack<T>(s[1][2 * g], s[1][2 * g + 1]);
      } else if constexpr (kIeee) {
        const int source = threadIdx.x % 4 * 8;  // of the heads 2 pair and, 4 lanes on, 2 pair + 1
#pragma unroll
        for (int t = 0; t < 16; t++) {
          const float value = s[t / 8][2 * g + t % 2];
          spread[g][t][0] = __shfl_sync(~0u, value, source + t % 8 / 2);
          spread[g][t][1] = __shfl_sync(~0u, value, source + 4 + t % 8 / 2);
        }
      }
    }
  }

  // d[g] (16, 8) += x^T (16, 16 tokens) w_g (16 tokens, 8 heads), x 16 columns of the tokens' rows; s as above.
  __device__ __forceinline__ void multiply(float (&d)[kHeadGroups][4], const T* x, int stride,
                                           const float (&s)[2][4]) const {
    const int row8 = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
    if constexpr (sizeof(T) == 2) {
      std::uint32_t columns[4];
      ptx::load_matrices_transposed(columns, x + matrices_across(stride));
#pragma unroll
      for (int g = 0; g < kHeadGroups; g++) ptx::multiply(T(), d[g], columns, packed[g]);
    } else if constexpr (kTf32) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        // k in the order of the sums' registers: token 2 pair, then token 2 pair + 1 in place of pair + 4.
        const float* at = x + (i * 8 + 2 * pair) * stride + row8;
        const std::uint32_t columns[4] = {ptx::round_to_tf32(at[0]), ptx::round_to_tf32(at[8]),
                                          ptx::round_to_tf32(at[stride]), ptx::round_to_tf32(at[stride + 8])};
#pragma unroll
        for (int g = 0; g < kHeadGroups; g++) {
          const std::uint32_t weights[2] = {ptx::round_to_tf32(s[i][2 * g]), ptx::round_to_tf32(s[i][2 * g + 1])};
          ptx::multiply_tf32(d[g], columns, weights);
        }
      }
    } else {
      float part[kHeadGroups][4] = {};
#pragma unroll
      for (int t = 0; t < 16; t++) {
        const float low = x[t * stride + row8], high = x[t * stride + row8 + 8];
#pragma unroll
        for (int g = 0; g < kHeadGroups; g++) {
          part[g][0] = fmaf(low, spread[g][t][0], part[g][0]);
          part[g][1] = fmaf(low, spread[g][t][1], part[g][1]);
          part[g][2] = fmaf(high, spread[g][t][0], part[g][2]);
          part[g][3] = fmaf(high, spread[g][t][1], part[g][3]);
        }
      }
#pragma unroll
      for (int g = 0; g < kHeadGroups; g++)
#pragma unroll
        for (int e = 0; e < 4; e++) d[g][e] += part[g][e];
    }
  }
};

}  // namespace crossvit::cuda
