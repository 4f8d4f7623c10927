/* A loop of independent fused multiply-adds in registers: what the cores can do at most. Called once per thread. */
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

enum { CHAINS = 12 }; /* latency of an FMA (4-5 cycles) times two ports, with room; fits 16 registers */

#if defined(__AVX512F__)
enum { BYTES = 64 };
#elif defined(__AVX__)
enum { BYTES = 32 };
#else
enum { BYTES = 16 };
#endif
typedef float vec __attribute__((vector_size(BYTES)));

/* Runs `steps` times CHAINS multiply-adds of a whole register and returns the floating-point operations done. */
double fma_float32(long steps, float *sink) {
  vec acc[CHAINS], factor, term;
  for (int lane = 0; lane < BYTES / 4; lane++) factor[lane] = 0.999f, term[lane] = sink[0] + 1e-3f;
  for (int chain = 0; chain < CHAINS; chain++) acc[chain] = term * (float)chain;
  for (long step = 0; step < steps; step++)
    for (int chain = 0; chain < CHAINS; chain++) acc[chain] = acc[chain] * factor + term;
  vec sum = acc[0];
  for (int chain = 1; chain < CHAINS; chain++) sum += acc[chain];
  sink[0] = sum[0];
  return 2.0 * (BYTES / 4) * CHAINS * steps;
}

/* The same with bfloat16 operands and float32 sums; 0 where the processor has no such instruction in its vector unit. */
double fma_bfloat16(long steps, float *sink) {
#if defined(__AVX512BF16__)
  __m512 acc[CHAINS];
  const __m512bh factor = (__m512bh)_mm512_set1_epi16(0x3f00), term = (__m512bh)_mm512_set1_epi16(0x3c00);
  for (int chain = 0; chain < CHAINS; chain++) acc[chain] = _mm512_set1_ps(sink[0] + chain);
  for (long step = 0; step < steps; step++)
    for (int chain = 0; chain < CHAINS; chain++) acc[chain] = _mm512_dpbf16_ps(acc[chain], factor, term);
  __m512 sum = acc[0];
  for (int chain = 1; chain < CHAINS; chain++) sum = _mm512_add_ps(sum, acc[chain]);
  sink[0] = _mm512_reduce_add_ps(sum);
  return 2.0 * 32 * CHAINS * steps;
#else
  (void)steps, (void)sink;
  return 0.0;
#endif
}
