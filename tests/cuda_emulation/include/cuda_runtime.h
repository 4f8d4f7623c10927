// The part of CUDA's runtime that the kernels use, on the CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "emulation.h"

// Function and variable qualifiers

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#define __shared__ \
  static thread_local  // works, but is neither poisoned nor bounds-checked: the kernels take dynamic memory

// threadIdx and its like are in emulation.h

constexpr int warpSize = 32;

// Vector types

#define EMULATION_VECTORS(T, name, alignment2, alignment4)   \
  struct alignas(alignment2) name##2 { T x, y; };            \
  struct name##3 { T x, y, z; };                             \
  struct alignas(alignment4) name##4 { T x, y, z, w; };      \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define uint3 emulation_uint3
EMULATION_VECTORS(unsigned, uint, 8, 16)
#undef uint3
EMULATION_VECTORS(float, float, 8, 16)
EMULATION_VECTORS(int, int, 8, 16)
#undef EMULATION_VECTORS

// Arithmetic

using std::max;
using std::min;
inline int min(int a, unsigned b) { return std::min<long long>(a, b); }
inline long long min(long long a, int b) { return std::min<long long>(a, b); }
inline long long min(int a, long long b) { return std::min<long long>(a, b); }
inline long long max(long long a, int b) { return std::max<long long>(a, b); }
inline long long max(int a, long long b) { return std::max<long long>(a, b); }
inline std::int64_t min(std::int64_t a, int b) { return std::min<std::int64_t>(a, b); }
inline std::int64_t min(int a, std::int64_t b) { return std::min<std::int64_t>(a, b); }
inline std::int64_t max(std::int64_t a, int b) { return std::max<std::int64_t>(a, b); }
inline std::int64_t max(int a, std::int64_t b) { return std::max<std::int64_t>(a, b); }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __uint_as_float(unsigned x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float __int_as_float(int x) { return __uint_as_float(unsigned(x)); }
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <class T>
T __ldcg(const T* pointer) {
  return *pointer;
}
template <class T>
void __stcs(T* pointer, T value) {
  *pointer = value;
}

// Atomics, of integers: sums of floats would depend on the order

template <class T>
  requires std::is_integral_v<T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// What a warp's lanes and a block's threads do together

inline void __syncthreads() { emulation::barrier(); }

namespace emulation {

struct Exchange {
  unsigned char value[16];
  int source;
  unsigned char result[16];
};

inline void exchange(void* const (&lanes)[32]) {
  for (void* lane : lanes) {
    auto& mine = *static_cast<Exchange*>(lane);
    std::memcpy(mine.result, static_cast<Exchange*>(lanes[mine.source])->value, sizeof mine.result);
  }
}

struct Vote {
  bool given;
  unsigned result;
};

inline void vote(void* const (&lanes)[32]) {
  unsigned ballot = 0;
  for (int i = 0; i < 32; ++i) ballot |= unsigned(static_cast<Vote*>(lanes[i])->given) << i;
  for (void* lane : lanes) static_cast<Vote*>(lane)->result = ballot;
}

inline void full(unsigned mask, const char* instruction) {
  if (mask == ~0u) return;
  char message[80];
  std::snprintf(message, sizeof message, "%s: only the full mask is emulated", instruction);
  fail(message);
}

template <class T>
T shuffle(const char* instruction, unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
  full(mask, instruction);
  Exchange mine{};
  std::memcpy(mine.value, &value, sizeof value);
  mine.source = source;
  collective(instruction, &mine, exchange);
  std::memcpy(&value, mine.result, sizeof value);
  return value;
}

inline unsigned ballot(const char* instruction, unsigned mask, bool given) {
  full(mask, instruction);
  Vote mine{given, 0};
  collective(instruction, &mine, vote);
  return mine.result;
}

}  // namespace emulation

inline void __syncwarp(unsigned mask = ~0u) {
  emulation::full(mask, "__syncwarp");
  emulation::collective("__syncwarp", nullptr, [](void* const(&)[32]) {});
}

// `width`, a power of two, parts the warp; a source outside a lane's part is the lane itself, as in CUDA.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = emulation::lane;
  return emulation::shuffle("__shfl_sync", mask, value, (lane & ~(width - 1)) + (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32) {
  const int lane = emulation::lane, other = lane ^ flip;
  return emulation::shuffle("__shfl_xor_sync", mask, value, other / width > lane / width ? lane : other);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance, int width = 32) {
  const int lane = emulation::lane, other = lane + distance;
  return emulation::shuffle("__shfl_down_sync", mask, value, other / width != lane / width ? lane : other);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance, int width = 32) {
  const int lane = emulation::lane, other = lane - distance;
  return emulation::shuffle("__shfl_up_sync", mask, value, other < (lane & ~(width - 1)) ? lane : other);
}
inline unsigned __ballot_sync(unsigned mask, bool given) { return emulation::ballot("__ballot_sync", mask, given); }
inline bool __any_sync(unsigned mask, bool given) { return emulation::ballot("__any_sync", mask, given) != 0; }
inline bool __all_sync(unsigned mask, bool given) { return emulation::ballot("__all_sync", mask, given) == ~0u; }

// The host's side

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : emulation::message();
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// Few multiprocessors, so that small tests meet both what splits its work for want of blocks and what does not.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const char* count = std::getenv("CROSSVIT_KERNELS_EMULATE_MULTIPROCESSORS");
  *value = attribute == cudaDevAttrMultiProcessorCount ? (count && *count ? std::atoi(count) : 8) : 163 * 1024;
  return cudaSuccess;
}
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  return emulation::allow_shared(reinterpret_cast<const void*>(kernel), value) ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, std::size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const auto body = [&] { kernel(Parameters(arguments)...); };
  return emulation::launch(reinterpret_cast<const void*>(kernel), config->gridDim, config->blockDim,
                           config->dynamicSmemBytes, body)
             ? cudaSuccess
             : cudaErrorLaunchFailure;
}
