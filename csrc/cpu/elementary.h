// The elementary functions that the kernels need, of vectors: exponentials, gelu and its derivative.
#pragma once

#include "vec.h"

namespace crossvit::CROSSVIT_ISA {

// ((first x + second) x + ...) x + the last.
template <class... Rest>
CROSSVIT_INLINE Vec polynomial(Vec x, float first, float second, Rest... rest) {
  Vec p = x * first + second;
  ((p = p * x + rest), ...);
  return p;
}

// 1 / x for x >= 1.
CROSSVIT_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec r = (Vec)_mm512_rcp14_ps((__m512)x);
  return r + r * (1.0f - x * r);  // one step of Newton's, from an error of 2^-14
#else
  return 1.0f / x;
#endif
}

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits

// exp(r) 2^n for |r| <= ln 2 / 2, n = shifted - kRound: a minimax polynomial, relative error 3e-9 before rounding.
CROSSVIT_INLINE Vec scaled_exponential(Vec r, __attribute__((unused)) Vec shifted, __attribute__((unused)) Vec n) {
  const Vec p =
      polynomial(r, 1.381446724e-3f, 8.368780836e-3f, 4.166839272e-2f, 1.666651964e-1f, 4.999999404e-1f, 1.0f, 1.0f);
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // In two steps, so that neither factor leaves the range of normal numbers.
  const IVec exponent = (IVec)shifted - 0x4b400000;
  const IVec half = exponent >> 1;
  return p * (Vec)((half + 127) << 23) * (Vec)((exponent - half + 127) << 23);
#endif
}

// exp(x): x = n ln 2 + r. Below -103.9 the result is 0, above 88.7 infinite; NaN stays.
CROSSVIT_INLINE Vec exponential(Vec x) {
  const Vec inside = minimum(broadcast(89.0f), maximum(broadcast(-104.0f), x));
  const Vec shifted = inside * 1.44269504088896f + kRound;
  const Vec n = shifted - kRound;
  const Vec r = (inside - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;
  return scaled_exponential(r, shifted, n);
}

#if defined(__AVX512DQ__)
// 2^x = 2^floor(x) polynomial(x - floor(x)), which are one instruction each; -inf gives 0, NaN stays. Degree 6: relative error 2e-9
// before rounding; degree 4: 3e-6.
template <int degree>
CROSSVIT_INLINE Vec exponential2(Vec x) {
  const Vec r = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec p;
  if constexpr (degree == 6) {
    p = polynomial(r, 0.0002161292068f, 0.001246784464f, 0.009675451554f, 0.05548528209f, 0.2402293086f, 0.6931470633f);
  } else {
    static_assert(degree == 4);
    p = polynomial(r, 0.0134266885f, 0.05224246532f, 0.241280213f, 0.6930448413f);
  }
  return (Vec)_mm512_scalef_ps((__m512)(p * r + 1.0f), (__m512)x);
}
#endif

// 2^x for x no more than a rounding above 0, as a softmax wants it: the rounding of x costs no more than that of the score
// it comes from. For results that become bfloat16 fewer terms will do.
template <bool bf16>
CROSSVIT_INLINE Vec exponential2_of_nonpositive(Vec x) {
#if defined(__AVX512DQ__)
  return exponential2<bf16 ? 4 : 6>(x);
#else
  const Vec inside = maximum(broadcast(-150.0f), x);
  const Vec shifted = inside + kRound;
  const Vec n = shifted - kRound;
  return scaled_exponential((inside - n) * 0.6931471805599453f, shifted, n);
#endif
}

// log2(erfc(t / sqrt 2)) = t * polynomial(t) on [0, 6], fitted so that Phi below has an absolute error under 3e-8; beyond, the
// polynomial falls fast enough that its exponential vanishes.
CROSSVIT_INLINE Vec log2_erfc(Vec t) {
  constexpr float kLog2E = 1.4426950408889634f;
  const Vec p = polynomial(t, -8.220959025e-09f * kLog2E, 3.226811884e-07f * kLog2E, -5.021960988e-06f * kLog2E,
                           4.006507879e-05f * kLog2E, -1.564761915e-04f * kLog2E, -6.382074207e-05f * kLog2E,
                           4.878616892e-03f * kLog2E, -3.638400137e-02f * kLog2E, -3.182986677e-01f * kLog2E,
                           -7.978854179e-01f * kLog2E);
  return p * t;
}

// Phi(x), the normal distribution function: erfc itself on the left, so that nothing cancels there.
CROSSVIT_INLINE Vec normal_cdf(Vec x) {
  const Vec tail = exponential2_of_nonpositive<false>(log2_erfc(absolute(x))) * 0.5f;
  return x < 0.0f ? tail : 1.0f - tail;
}

// gelu(x) = x Phi(x) (the erf form), and its derivative Phi(x) + x phi(x).
CROSSVIT_INLINE Vec gelu(Vec x) { return x * normal_cdf(x); }
CROSSVIT_INLINE Vec gelu_derivative(Vec x) {
  constexpr float kInverseRoot2Pi = 0.3989422804014327f;
  return normal_cdf(x) + x * (exponential(x * x * -0.5f) * kInverseRoot2Pi);
}
// Both, from one exponential: Phi(-t) = exp(-t^2 / 2) * polynomial(1 / (1 + t / 4)), fitted to an absolute error of 4e-9.
CROSSVIT_INLINE void gelu_and_derivative(Vec x, Vec& value, Vec& derivative) {
  constexpr float kInverseRoot2Pi = 0.3989422804014327f;
  const Vec bell = exponential(x * x * -0.5f), s = reciprocal(absolute(x) * 0.25f + 1.0f);
  const Vec p =
      polynomial(s, -9.153429237548866e-02f, 3.410487934736667e-01f, -2.653700536238776e-01f, 2.788949077419107e-01f,
                 2.647405472876809e-02f, 1.115772263127798e-01f, 9.890936009762583e-02f);
  const Vec tail = p * s * bell, cdf = x < 0.0f ? tail : 1.0f - tail;
  value = x * cdf;
  derivative = cdf + x * (bell * kInverseRoot2Pi);
}

// gelu(x) for a result that becomes a bfloat16: erf(x / sqrt 2) as an odd polynomial up to 4.4, where it is 1, fitted for the least
// error of gelu: at most 4.3e-5.
CROSSVIT_INLINE Vec gelu_bf16(Vec x) {
  const Vec t = minimum(broadcast(4.4f), maximum(broadcast(-4.4f), x)), u = t * t;
  const Vec p = polynomial(u, 7.13885895e-11f, -7.5080937e-09f, 3.48169152e-07f, -9.44972635e-06f, 0.000168585873f,
                           -0.0021099837f, 0.0192860514f, -0.132152855f, 0.79752177f);
  const Vec half = x * 0.5f;
  return half * (t * p) + half;
}

// The same and its derivative, whose distance from a half is an odd polynomial too, up to 4.4, where it is a half: error at most
// 2e-4. At infinity it is not a number, as in torch.
CROSSVIT_INLINE void gelu_and_derivative_bf16(Vec x, Vec& value, Vec& derivative) {
  value = gelu_bf16(x);
  const Vec t = minimum(broadcast(4.4f), maximum(broadcast(-4.4f), x)), u = t * t;
  const Vec p = polynomial(u, -2.7317976e-11f, 2.97767122e-09f, -1.43557884e-07f, 4.05643596e-06f, -7.51660846e-05f,
                           0.000968438224f, -0.00893071014f, 0.0588625893f, -0.265176058f, 0.797697484f);
  derivative = t * p + (x * 0.0f + 0.5f);
}

}  // namespace crossvit::CROSSVIT_ISA
