// Matrix products in the one form all kernels share: C[e][r] = sum_k A[e][k] B[k][r].
//
// B is a *panel*: a few vectors of lanes (rows of the activations, queries, ...) for every k, which the kernel that
// made the activations has written in this order. A is read as it lies: each element (bfloat16: each pair) is
// broadcast, so weights need no packing and cannot be stale. 8 x 3 accumulators fill the registers and keep the FMA
// units busy; the result is transposed only where it leaves the panel.
#pragma once

#include "elementary.h"

namespace crossvit::CROSSVIT_ISA {

// Vectors of lanes in a panel, at most. An aarch64 has 32 registers, and up to four units that each begin a multiplication in
// every cycle and end it four cycles later: they want 16 accumulators, and a fifth vector would spill some.
#if defined(__aarch64__)
constexpr int kPanelVectors = 4;
#else
constexpr int kPanelVectors = 3;
#endif
#if defined(__AVX512F__)
constexpr int kBlock = 8;  // rows of A in a register tile
#else
constexpr int kBlock = 4;
#endif

constexpr int64_t kDepthChunk = 256;  // products summed in one chain, at most (float32)
constexpr int64_t kScoreChunk = 32;   // the same for scores, whose error an exponential multiplies

// A panel of at most kHalf rows is multiplied by half vectors, which processors that split a vector in two do in half the time.
#if defined(__AVX512F__)
constexpr int kHalf = VL / 2;
#else
constexpr int kHalf = VL;
#endif
typedef float HalfVec __attribute__((vector_size(kHalf * 4)));

struct MultiplyF32 {
  using Element = float;
  template <class V>
  static CROSSVIT_INLINE V fma(V c, float a, V b) {
    return c + a * b;
  }
};
#if defined(__AVX512BF16__)
struct MultiplyBf16 {
  using Element = int32_t;
  static CROSSVIT_INLINE Vec fma(Vec c, int32_t a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
  }
  static CROSSVIT_INLINE HalfVec fma(HalfVec c, int32_t a, HalfVec b) {
    return (HalfVec)_mm256_dpbf16_ps((__m256)c, (__m256bh)_mm256_set1_epi32(a), (__m256bh)b);
  }
};
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
struct MultiplyBf16 {
  using Element = int32_t;
  static CROSSVIT_INLINE Vec fma(Vec c, int32_t a, Vec b) {
    return (Vec)vbfdotq_f32((float32x4_t)c, (bfloat16x8_t)b, (bfloat16x8_t)vdupq_n_s32(a));
  }
};
#endif

// What a product asks of memory meanwhile, a line now and then: prefetches in one burst would hold up the loads of the
// panel, which wait for the same buffers.
struct NothingAhead {
  static constexpr bool active = false;
};
// weights: the lines of the rows that the next block multiplies, one behind the other where rows lie so (elsewhere it asks for
// lines that nobody wants). With lines, also of the rows that an epilogue will write and read, `last + 1` of them.
template <bool lines>
struct Ahead {
  static constexpr bool active = true;
  const char* weights = nullptr;
  char *const *write = nullptr, *const *read = nullptr;
  int64_t write_offset = 0, read_offset = 0, last = 0, at = 0;
  CROSSVIT_INLINE void step() {
    __builtin_prefetch(weights);
    weights += 64;
    if constexpr (lines) {
      __builtin_prefetch(write[at] + write_offset, 1);
      __builtin_prefetch(read[at] + read_offset);
      at += at < last;
    }
  }
};
constexpr int64_t kAheadSteps = 2;  // a block of kBlock rows has a line for every two steps

// Where a tile's kBlock rows of A are: anywhere, or at equal distances, which leaves registers for what lies ahead.
struct ScatteredRows {
  const char* row[kBlock];
  CROSSVIT_INLINE const char* operator[](int e) const { return row[e]; }
  CROSSVIT_INLINE void advance(int64_t bytes) {
#pragma GCC unroll 16
    for (int e = 0; e < kBlock; e++) row[e] += bytes;
  }
};
struct EvenRows {
  const char *low, *high;
  int64_t distance;
  EvenRows(const char* first, int64_t bytes) : low(first), high(first + kBlock / 2 * bytes), distance(bytes) {}
  CROSSVIT_INLINE const char* operator[](int e) const {
    return e < kBlock / 2 ? low + e * distance : high + (e - kBlock / 2) * distance;
  }
  CROSSVIT_INLINE void advance(int64_t bytes) {
    low += bytes;
    high += bytes;
    // Kept from turning them into a register per row.
    __asm__("" : "+r"(low), "+r"(high));
  }
};

// One register tile. b: steps x NV vectors V, ldb floats apart; c: kBlock x NV vectors, ldc apart.
// What c held is added after the products are summed, so that a long sum is made of short ones and rounds like them.
template <class Multiply, int NV, bool accumulate, class V = Vec, class ARows, class Meanwhile>
CROSSVIT_INLINE void tile(ARows a, const float* b, int64_t ldb, int64_t steps, float* c, int64_t ldc,
                          Meanwhile& ahead) {
  V sum[kBlock][NV];
#pragma GCC unroll 16
  for (int e = 0; e < kBlock; e++)
#pragma GCC unroll 16
    for (int v = 0; v < NV; v++) sum[e][v] = V{};
  auto step = [&](int64_t i) __attribute__((always_inline)) {
    V lanes[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; v++) __builtin_memcpy(&lanes[v], b + v * VL, sizeof(V));
#pragma GCC unroll 16
    for (int e = 0; e < kBlock; e++) {
      typename Multiply::Element s;
      __builtin_memcpy(&s, a[e] + 4 * i, 4);
#pragma GCC unroll 16
      for (int v = 0; v < NV; v++) sum[e][v] = Multiply::fma(sum[e][v], s, lanes[v]);
    }
    b += ldb;
  };
  int64_t k = 0;
  if constexpr (Meanwhile::active) {
    Meanwhile local = ahead;
    for (; k + kAheadSteps <= steps; k += kAheadSteps) {
      local.step();
#pragma GCC unroll 16
      for (int i = 0; i < kAheadSteps; i++) step(i);
      a.advance(4 * kAheadSteps);
    }
    ahead = local;
    for (; k < steps; k++) {
      step(0);
      a.advance(4);
    }
  } else {
    for (; k < steps; k++) step(k);
  }
#pragma GCC unroll 16
  for (int e = 0; e < kBlock; e++)
#pragma GCC unroll 16
    for (int v = 0; v < NV; v++) {
      float* at = c + e * ldc + v * VL;
      if constexpr (accumulate) {
        V before;
        __builtin_memcpy(&before, at, sizeof before);
        sum[e][v] = before + sum[e][v];
      }
      __builtin_memcpy(at, &sum[e][v], sizeof(V));
    }
}

CROSSVIT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
// How many of a vector's lanes so many values fill.
CROSSVIT_INLINE int lanes_in(int64_t left) { return static_cast<int>(smaller(left, VL)); }
CROSSVIT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
CROSSVIT_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
CROSSVIT_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A distance between rows, in floats, of an odd number of cache lines, so that rows do not fall on the same few sets.
CROSSVIT_INLINE int64_t spread(int64_t columns) { return (ceil_div(columns, 16) | 1) * 16; }

CROSSVIT_INLINE int64_t size_of(DType d) { return d == DType::float32 ? 4 : 2; }

// A panel in scratch: k-th step at data + k * lanes. pairs: each lane holds the bfloat16 pair (2k, 2k + 1). half: only the
// first kHalf lanes are rows, and only these are multiplied.
struct Panel {
  float* data;
  int64_t lanes;
  bool pairs;
  bool half = false;
};
CROSSVIT_INLINE bool is_half(int64_t count) { return kHalf < VL && count <= kHalf; }

// Whether products with a matrix of this dtype and depth run on bfloat16 pairs.
CROSSVIT_INLINE bool multiplies_pairs(DType dtype, int64_t depth) {
  return kDotBf16 && dtype == DType::bfloat16 && depth % 2 == 0;
}

template <int NV, bool accumulate, class V = Vec, class ARows, class Meanwhile>
CROSSVIT_INLINE void multiply_rows(ARows row, int64_t depth, const Panel& b, float* c, int64_t ldc, int64_t chunk,
                                   Meanwhile& ahead) {
  if constexpr (NV == 1 && kHalf < VL && sizeof(V) == sizeof(Vec)) {
    if (b.half) return multiply_rows<NV, accumulate, HalfVec>(row, depth, b, c, ldc, chunk, ahead);
  }
#if defined(CROSSVIT_DOT_BF16)
  if (b.pairs) return tile<MultiplyBf16, NV, accumulate, V>(row, b.data, b.lanes, depth / 2, c, ldc, ahead);
#endif
  const int64_t pieces = ceil_div(depth, chunk);
  for (int64_t p = 0; p < pieces; p++) {
    const int64_t k = p * depth / pieces, steps = (p + 1) * depth / pieces - k;
    if (p == 0)
      tile<MultiplyF32, NV, accumulate, V>(row, b.data, b.lanes, steps, c, ldc, ahead);
    else
      tile<MultiplyF32, NV, true, V>(row, b.data + k * b.lanes, b.lanes, steps, c, ldc, ahead);
    row.advance(4 * steps);
  }
}

// c[e][r], e < kBlock, = sum_k A[first + e][k] panel[k][r]. Rows past count repeat the last one: their results are not
// to be used. widened: scratch of kBlock * depth floats, for a bfloat16 matrix where the product runs in float32.
template <int NV, bool accumulate = false, class Meanwhile = NothingAhead>
inline void multiply_block(const Matrix& a, int64_t first, int64_t count, int64_t depth, const Panel& b, float* c,
                           int64_t ldc, float* widened, int64_t chunk = kDepthChunk, Meanwhile* meanwhile = nullptr) {
  const int64_t bytes = a.row_stride * size_of(a.dtype);
  const char* rows = static_cast<const char*>(a.data) + first * bytes;
  if constexpr (Meanwhile::active) {
    if (count >= kBlock && (b.pairs || a.dtype == DType::float32))
      return multiply_rows<NV, accumulate>(EvenRows(rows, bytes), depth, b, c, ldc, chunk, *meanwhile);
  }
  ScatteredRows row;
  for (int e = 0; e < kBlock; e++) row.row[e] = rows + smaller(e, count - 1) * bytes;
  if (a.dtype == DType::bfloat16 && !b.pairs) {
    for (int e = 0; e < kBlock; e++) {
      const Bf16* from = reinterpret_cast<const Bf16*>(row[e]);
      float* to = widened + e * depth;
      int64_t k = 0;
      for (; k + VL <= depth; k += VL) store(to + k, load(from + k));
      for (; k < depth; k++) to[k] = widen(from[k]);
      row.row[e] = reinterpret_cast<const char*>(to);
    }
  }
  NothingAhead nothing;
  multiply_rows<NV, accumulate>(row, depth, b, c, ldc, chunk, nothing);
}

}  // namespace crossvit::CROSSVIT_ISA
