// Element types: conversions to float and back, packed pairs, and the choice of a template's types at run time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "types.h"

namespace crossvit::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (__is_same(T, __half)) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// Two 16-bit numbers as an operand register of a matrix instruction, the first in the low half.
template <class T>
__device__ __forceinline__ std::uint32_t pack(float low, float high) {
  std::uint32_t packed;
  if constexpr (__is_same(T, __half)) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&packed, &pair, 4);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&packed, &pair, 4);
  }
  return packed;
}

// Sixteen bytes of elements, moved at once.
template <class T>
struct alignas(16) Chunk {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

// An element of a vector whose type is known at run time only (LayerNorm's weight and bias, biases: read once a tile).
__device__ __forceinline__ float load(const void* data, DType dtype, std::int64_t i) {
  if (dtype == DType::float32) return static_cast<const float*>(data)[i];
  if (dtype == DType::float16) return to_float(static_cast<const __half*>(data)[i]);
  return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
}

__device__ __forceinline__ float load(const Vector& from, std::int64_t i) { return load(from.data, from.dtype, i); }
__device__ __forceinline__ float load_or_zero(const Vector& from, std::int64_t i) {
  return from.data ? load(from, i) : 0;
}

__device__ __forceinline__ void store(const Target& to, std::int64_t i, float value) {
  if (to.dtype == DType::float32) {
    static_cast<float*>(to.data)[i] = value;
  } else if (to.dtype == DType::float16) {
    static_cast<__half*>(to.data)[i] = __float2half_rn(value);
  } else {
    static_cast<__nv_bfloat16*>(to.data)[i] = __float2bfloat16_rn(value);
  }
}

// The sum over groups of kLanes adjacent lanes, in each of them.
template <int kLanes>
__device__ __forceinline__ float sum_lanes(float value) {
  if constexpr (kLanes == 1)
    return value;
  else
    return sum_lanes<kLanes / 2>(value + __shfl_xor_sync(~0u, value, kLanes / 2));
}

__host__ __device__ constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// f(element of the type): f([](auto example) { using T = decltype(example); ... }).
template <class F>
decltype(auto) with_type(DType dtype, F&& f) {
  if (dtype == DType::float32) return f(float());
  if (dtype == DType::float16) return f(__half());
  return f(__nv_bfloat16());
}

// f.operator()<T, kTf32>() of the matrix operands' type.
template <class F>
auto with_math(DType dtype, bool tf32, F&& f) {
  if (dtype == DType::float16) return f.template operator()<__half, false>();
  if (dtype == DType::bfloat16) return f.template operator()<__nv_bfloat16, false>();
  return tf32 ? f.template operator()<float, true>() : f.template operator()<float, false>();
}

}  // namespace crossvit::cuda
