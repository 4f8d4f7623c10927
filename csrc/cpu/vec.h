// Vectors of VL floats and their memory forms (float32, bfloat16).
//
// Compiled once per instruction set (isa.cpp), so everything lives in a namespace named after the set and nothing
// here, or above it, includes the standard library: an inline function of libstdc++ compiled for AVX-512 must never
// be the copy that the linker keeps for everyone.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif

#include "kernels.h"

#define CROSSVIT_INLINE inline __attribute__((always_inline))

namespace crossvit::CROSSVIT_ISA {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

// Whether the machine multiplies bfloat16 pairs.
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define CROSSVIT_DOT_BF16
constexpr bool kDotBf16 = true;
#else
constexpr bool kDotBf16 = false;
#endif

typedef float Vec __attribute__((vector_size(VL * 4)));
typedef int32_t IVec __attribute__((vector_size(VL * 4)));
typedef uint32_t UVec __attribute__((vector_size(VL * 4)));
typedef uint16_t HalfWords __attribute__((vector_size(VL * 2)));

template <int... L>
struct Lanes {};
#if defined(__AVX512F__)
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif defined(__AVX2__)
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7>;
#else
using AllLanes = Lanes<0, 1, 2, 3>;
#endif

CROSSVIT_INLINE Vec broadcast(float s) { return s - Vec{}; }

CROSSVIT_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
CROSSVIT_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

// A bfloat16 in memory: the upper half of a float32.
struct Bf16 {
  uint16_t bits;
};

CROSSVIT_INLINE float widen(Bf16 h) {
  const uint32_t bits = static_cast<uint32_t>(h.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest even in the upper half of each lane; a NaN stays one (quiet).
CROSSVIT_INLINE UVec round_bits(Vec v) {
  const UVec u = (UVec)v;
  const UVec rounded = u + 0x7fffu + ((u >> 16) & 1u);
  const UVec quiet = u | 0x400000u;
  const UVec ordered = (UVec)(v == v);
  return (rounded & ordered) | (quiet & ~ordered);
}
CROSSVIT_INLINE Bf16 narrow(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  if (f != f) return {static_cast<uint16_t>((u | 0x400000u) >> 16)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

CROSSVIT_INLINE Vec load(const Bf16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  HalfWords h;
  __builtin_memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, UVec) << 16);
#endif
}
CROSSVIT_INLINE void store(Bf16* p, Vec v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  __builtin_memcpy(p, &h, sizeof h);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  const bfloat16x4_t h = vcvt_bf16_f32((float32x4_t)v);
  __builtin_memcpy(p, &h, sizeof h);
#elif defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)(round_bits(v) >> 16)));
#else
  const HalfWords h = __builtin_convertvector(round_bits(v) >> 16, HalfWords);
  __builtin_memcpy(p, &h, sizeof h);
#endif
}

// The first n lanes only: what lies behind them in memory is neither read nor written.
CROSSVIT_INLINE Vec load_n(const float* p, int n) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#else
  Vec v{};
  for (int i = 0; i < n; i++) v[i] = p[i];
  return v;
#endif
}
CROSSVIT_INLINE Vec load_n(const Bf16* p, int n) {
  Vec v{};
  for (int i = 0; i < n; i++) v[i] = widen(p[i]);
  return v;
}
CROSSVIT_INLINE void store_n(float* p, Vec v, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
#else
  for (int i = 0; i < n; i++) p[i] = v[i];
#endif
}
CROSSVIT_INLINE void store_n(Bf16* p, Vec v, int n) {
  for (int i = 0; i < n; i++) p[i] = narrow(v[i]);
}

// Two rows of floats as bfloat16 pairs: lane r of the result holds (even[r], odd[r]), even in the low half.
CROSSVIT_INLINE Vec pair(Vec even, Vec odd) {
#if defined(__AVX512BF16__)
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Vec)_mm512_permutexvar_epi16(interleave, both);
#else
  return (Vec)((round_bits(even) >> 16) | (round_bits(odd) & 0xffff0000u));
#endif
}

// A NaN in b comes through: the hardware's maximum and minimum return their second operand then.
CROSSVIT_INLINE Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
CROSSVIT_INLINE Vec minimum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
CROSSVIT_INLINE Vec absolute(Vec x) { return (Vec)((UVec)x & 0x7fffffffu); }

CROSSVIT_INLINE float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = 0;
  for (int i = 0; i < VL; i++) s += v[i];
  return s;
#endif
}

CROSSVIT_INLINE Vec square_root(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)x);
#else
  Vec r;
  for (int i = 0; i < VL; i++) r[i] = __builtin_sqrtf(x[i]);
  return r;
#endif
}

// A VL x VL transpose by butterflies: in step s, lanes that differ in bit s change rows.
template <int S, int... L>
CROSSVIT_INLINE void exchange(Vec& a, Vec& b, __attribute__((unused)) Lanes<L...>) {
  const Vec low = __builtin_shufflevector(a, b, ((L & S) ? L - S + VL : L)...);
  const Vec high = __builtin_shufflevector(a, b, ((L & S) ? L + VL : L + S)...);
  a = low;
  b = high;
}
template <int S, int N>
CROSSVIT_INLINE void transpose_step(Vec* rows) {
  if constexpr (S < N) {
#pragma GCC unroll 16
    for (int i = 0; i < N; i++)
      if ((i & S) == 0) exchange<S>(rows[i], rows[i + S], AllLanes{});
    transpose_step<2 * S, N>(rows);
  }
}
CROSSVIT_INLINE void transpose(Vec* rows) { transpose_step<1, VL>(rows); }
// VL / 2 rows: each half of their columns is transposed; row i then holds columns i and i + VL / 2, one behind the other.
CROSSVIT_INLINE void transpose_halves(Vec* rows) { transpose_step<1, VL / 2>(rows); }

}  // namespace crossvit::CROSSVIT_ISA
