// Matrix products in the one form all kernels share: C[e][r] = sum_k A[e][k] B[k][r].
//
// B is a *panel*: up to three vectors of lanes (rows of the activations, queries, ...) for every k, which the kernel that
// made the activations has written in this order. A is read as it lies: each element (bfloat16: each pair) is
// broadcast, so weights need no packing and cannot be stale. 8 x 3 accumulators fill the registers and keep the FMA
// units busy; the result is transposed only where it leaves the panel.
#pragma once

#include "vec.h"

namespace crossvit::CROSSVIT_ISA {

constexpr int kPanelVectors = 3;  // vectors of lanes in a panel, at most
#if defined(__AVX512F__)
constexpr int kBlock = 8;  // rows of A in a register tile
#else
constexpr int kBlock = 4;
#endif

constexpr int64_t kDepthChunk = 256;  // products summed in one chain, at most (float32)
constexpr int64_t kScoreChunk = 32;   // the same for scores, whose error an exponential multiplies

struct MultiplyF32 {
  using Element = float;
  static CROSSVIT_INLINE Vec fma(Vec c, float a, Vec b) { return c + a * b; }
};
#if defined(__AVX512BF16__)
struct MultiplyBf16 {
  using Element = int32_t;
  static CROSSVIT_INLINE Vec fma(Vec c, int32_t a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
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
    CROSSVIT_UNROLL
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

// One register tile. b: steps x NV vectors, ldb floats apart; c: kBlock x NV vectors, ldc apart.
// What c held is added after the products are summed, so that a long sum is made of short ones and rounds like them.
template <class Multiply, int NV, bool accumulate, class ARows, class Meanwhile>
CROSSVIT_INLINE void tile(ARows a, const float* b, int64_t ldb, int64_t steps, float* c, int64_t ldc,
                          Meanwhile& ahead) {
  Vec sum[kBlock][NV];
  CROSSVIT_UNROLL
  for (int e = 0; e < kBlock; e++)
    CROSSVIT_UNROLL
    for (int v = 0; v < NV; v++) sum[e][v] = Vec{};
  auto step = [&](int64_t i) __attribute__((always_inline)) {
    Vec lanes[NV];
    CROSSVIT_UNROLL
    for (int v = 0; v < NV; v++) lanes[v] = load(b + v * VL);
    CROSSVIT_UNROLL
    for (int e = 0; e < kBlock; e++) {
      typename Multiply::Element s;
      __builtin_memcpy(&s, a[e] + 4 * i, 4);
      CROSSVIT_UNROLL
      for (int v = 0; v < NV; v++) sum[e][v] = Multiply::fma(sum[e][v], s, lanes[v]);
    }
    b += ldb;
  };
  int64_t k = 0;
  if constexpr (Meanwhile::active) {
    Meanwhile local = ahead;
    for (; k + kAheadSteps <= steps; k += kAheadSteps) {
      local.step();
      CROSSVIT_UNROLL
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
  CROSSVIT_UNROLL
  for (int e = 0; e < kBlock; e++)
    CROSSVIT_UNROLL
    for (int v = 0; v < NV; v++) {
      float* at = c + e * ldc + v * VL;
      store(at, accumulate ? load(at) + sum[e][v] : sum[e][v]);
    }
}

CROSSVIT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
CROSSVIT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
CROSSVIT_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
CROSSVIT_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A distance between rows, in floats, of an odd number of cache lines, so that rows do not fall on the same few sets.
CROSSVIT_INLINE int64_t spread(int64_t columns) { return (ceil_div(columns, 16) | 1) * 16; }

CROSSVIT_INLINE int64_t size_of(DType d) { return d == DType::f32 ? 4 : 2; }

constexpr int64_t kPrefetchBlocks = 8;  // blocks of columns by which a load of rows runs ahead

// A panel in scratch: k-th step at data + k * lanes. pairs: each lane holds the bfloat16 pair (2k, 2k + 1).
struct Panel {
  float* data;
  int64_t lanes;
  bool pairs;
};

// Whether products with a matrix of this dtype and depth run on bfloat16 pairs.
CROSSVIT_INLINE bool multiplies_pairs(DType dtype, int64_t depth) {
  return kDotBf16 && dtype == DType::bf16 && depth % 2 == 0;
}

template <int NV, bool accumulate, class ARows, class Meanwhile>
CROSSVIT_INLINE void multiply_rows(ARows row, int64_t depth, const Panel& b, float* c, int64_t ldc, int64_t chunk,
                                   Meanwhile& ahead) {
#if defined(__AVX512BF16__)
  if (b.pairs) return tile<MultiplyBf16, NV, accumulate>(row, b.data, b.lanes, depth / 2, c, ldc, ahead);
#endif
  const int64_t pieces = ceil_div(depth, chunk);
  for (int64_t p = 0; p < pieces; p++) {
    const int64_t k = p * depth / pieces, steps = (p + 1) * depth / pieces - k;
    if (p == 0)
      tile<MultiplyF32, NV, accumulate>(row, b.data, b.lanes, steps, c, ldc, ahead);
    else
      tile<MultiplyF32, NV, true>(row, b.data + k * b.lanes, b.lanes, steps, c, ldc, ahead);
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
    if (count >= kBlock && (b.pairs || a.dtype == DType::f32))
      return multiply_rows<NV, accumulate>(EvenRows(rows, bytes), depth, b, c, ldc, chunk, *meanwhile);
  }
  ScatteredRows row;
  for (int e = 0; e < kBlock; e++) row.row[e] = rows + smaller(e, count - 1) * bytes;
  if (a.dtype == DType::bf16 && !b.pairs) {
    for (int e = 0; e < kBlock; e++) {
      const uint16_t* from = reinterpret_cast<const uint16_t*>(row[e]);
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

CROSSVIT_INLINE char* row_pointer(const Rows& rows, int64_t m) {
  const int64_t offset = (m / rows.per_batch) * rows.batch_stride + (m % rows.per_batch) * rows.row_stride;
  return static_cast<char*>(rows.data) + offset * size_of(rows.dtype);
}

// Rows [m, m + count) and columns [k, k + depth) of a matrix, transposed: to[i * lanes + r]. Lanes past count are zero.
template <class Element>
inline void load_transposed_as(const Rows& rows, int64_t m, int64_t count, int64_t k, int64_t depth, float* to,
                               int64_t lanes) {
  for (int64_t r0 = 0; r0 < lanes; r0 += VL) {
    const Element* from[VL];
    const int64_t here = smaller(larger(count - r0, 0), VL);
    for (int64_t i = 0; i < here; i++) from[i] = reinterpret_cast<const Element*>(row_pointer(rows, m + r0 + i)) + k;
    for (int64_t i = 0; i < depth; i += VL) {
      Vec block[VL];
      const int64_t n = smaller(depth - i, VL);
      // So many rows at once are more streams than the hardware follows.
      for (int64_t r = 0; r < here; r++) __builtin_prefetch(from[r] + i + kPrefetchBlocks * VL);
      if (here == VL && n == VL) {
        CROSSVIT_UNROLL
        for (int r = 0; r < VL; r++) block[r] = load(from[r] + i);
      } else {
        CROSSVIT_UNROLL
        for (int r = 0; r < VL; r++) block[r] = r < here ? load_n(from[r] + i, static_cast<int>(n)) : Vec{};
      }
      transpose(block);
      if (n == VL) {
        CROSSVIT_UNROLL
        for (int j = 0; j < VL; j++) store(to + (i + j) * lanes + r0, block[j]);
      } else {
        float corner[VL * VL];
        CROSSVIT_UNROLL
        for (int j = 0; j < VL; j++) store(corner + j * VL, block[j]);
        for (int64_t j = 0; j < n; j++) store(to + (i + j) * lanes + r0, load(corner + j * VL));
      }
    }
  }
}
inline void load_transposed(const Rows& rows, int64_t m, int64_t count, int64_t k, int64_t depth, float* to,
                            int64_t lanes) {
  if (rows.dtype == DType::f32)
    load_transposed_as<float>(rows, m, count, k, depth, to, lanes);
  else
    load_transposed_as<uint16_t>(rows, m, count, k, depth, to, lanes);
}

// Hands every row of c (columns x lanes, at most VL columns) to use(row, values of the columns).
template <int NV, class Use>
CROSSVIT_INLINE void for_each_row(const float* c, int64_t ldc, int64_t count, Use use) {
  CROSSVIT_UNROLL
  for (int v = 0; v < NV; v++) {
    if (v * VL >= count) break;
    Vec block[VL];
    CROSSVIT_UNROLL
    for (int e = 0; e < VL; e++) block[e] = load(c + e * ldc + v * VL);
    transpose(block);
    float row[VL * VL];
    CROSSVIT_UNROLL
    for (int r = 0; r < VL; r++) store(row + r * VL, block[r]);
    const int64_t here = smaller(count - v * VL, VL);
    for (int64_t r = 0; r < here; r++) use(v * VL + r, load(row + r * VL));
  }
}

// n values from a column of a row on, as floats and back.
CROSSVIT_INLINE Vec load_as(DType dtype, const char* row, int64_t column, int n) {
  if (dtype == DType::f32) {
    const float* f = reinterpret_cast<const float*>(row) + column;
    return n == VL ? load(f) : load_n(f, n);
  }
  const uint16_t* h = reinterpret_cast<const uint16_t*>(row) + column;
  return n == VL ? load(h) : load_n(h, n);
}
CROSSVIT_INLINE void store_as(DType dtype, char* row, int64_t column, Vec v, int n) {
  if (dtype == DType::f32) {
    float* f = reinterpret_cast<float*>(row) + column;
    n == VL ? store(f, v) : store_n(f, v, n);
  } else {
    uint16_t* h = reinterpret_cast<uint16_t*>(row) + column;
    n == VL ? store(h, v) : store_n(h, v, n);
  }
}

// The rows of one panel, found once: the divisions of row_pointer would cost as much as the products otherwise.
struct PanelRows {
  char* row[kPanelVectors * VL];
  DType dtype;
  PanelRows(const Rows& rows, int64_t m, int64_t count) : dtype(rows.dtype) {
    if (!rows.data) return;
    for (int64_t r = 0; r < count; r++) row[r] = row_pointer(rows, m + r);
  }
  // Asks for the rows' columns while products keep the core busy; they are too many streams for the hardware.
  template <bool write>
  CROSSVIT_INLINE void prefetch(int64_t count, int64_t column) const {
    const int64_t offset = column * size_of(dtype);
    for (int64_t r = 0; r < count; r++) __builtin_prefetch(row[r] + offset, write);
  }
  CROSSVIT_INLINE Vec load(int64_t r, int64_t column, int n) const { return load_as(dtype, row[r], column, n); }
  CROSSVIT_INLINE void store(int64_t r, int64_t column, Vec v, int n) const { store_as(dtype, row[r], column, v, n); }
};

// VL columns of c (columns x lanes) and their bias, as bfloat16 rows: neighbours share a lane before they are transposed, which
// halves the shuffles.
template <int NV>
CROSSVIT_INLINE void store_pairs(const float* c, int64_t ldc, int64_t count, const float* bias, const PanelRows& out,
                                 int64_t column) {
  for (int64_t v = 0; v * VL < count; v++) {
    Vec both[VL / 2];
    CROSSVIT_UNROLL
    for (int e = 0; e < VL / 2; e++) {
      const float* at = c + 2 * e * ldc + v * VL;
      both[e] = pair(CROSSVIT_ISA::load(at) + bias[2 * e], CROSSVIT_ISA::load(at + ldc) + bias[2 * e + 1]);
    }
    transpose_halves(both);
    float rows[VL / 2 * VL];
    CROSSVIT_UNROLL
    for (int r = 0; r < VL / 2; r++) CROSSVIT_ISA::store(rows + r * VL, both[r]);
    const int64_t here = smaller(count - v * VL, VL);
    for (int64_t r = 0; r < here; r++)
      __builtin_memcpy(out.row[v * VL + r] + 2 * column, rows + r % (VL / 2) * VL + r / (VL / 2) * (VL / 2), 2 * VL);
  }
}

CROSSVIT_INLINE float element(const Vector& v, int64_t i) {
  return v.dtype == DType::f32 ? static_cast<const float*>(v.data)[i] : widen(static_cast<const uint16_t*>(v.data)[i]);
}
// A parameter vector as floats, zero-padded to whole vectors; absent: filled with the given value.
inline void load_vector(const Vector& v, int64_t first, int64_t count, float absent, float* to) {
  const int64_t padded = round_up(count, VL);
  for (int64_t i = 0; i < padded; i++) to[i] = i >= count ? 0.0f : v.data ? element(v, first + i) : absent;
}

// Float rows of a panel as bfloat16 pairs, in place. An even depth.
inline void pack_pairs(float* data, int64_t lanes, int64_t depth) {
  for (int64_t k = 0; k < depth / 2; k++)
    for (int64_t r = 0; r < lanes; r += VL)
      store(data + k * lanes + r, pair(load(data + 2 * k * lanes + r), load(data + (2 * k + 1) * lanes + r)));
}

// How `rows` rows are cut into panels. For several threads: full panels, as many for each; what is left in as
// many again or, with `cut` and where threads would wait, in panels that are cut by the result's columns too.
struct PanelSplit {
  int64_t vectors, full, panels;
  bool by_columns;  // whether the panels behind the full ones are to be cut
  explicit PanelSplit(int64_t rows, int64_t threads = 1, bool cut = false)
      : vectors(ceil_div(rows, VL)), full(threads > 1 ? vectors / (threads * kPanelVectors) * threads : 0) {
    const int64_t rest = vectors - full * kPanelVectors, idle = round_up(rest, threads) - rest;
    by_columns = cut && 50 * idle > vectors;  // to prepare a panel once more costs 2 % too
    panels = full + (threads == 1 || by_columns ? ceil_div(rest, kPanelVectors) : smaller(rest, threads));
  }
  int64_t first(int64_t panel) const {
    if (panel <= full) return panel * kPanelVectors * VL;
    const int64_t rest = vectors - full * kPanelVectors;
    return (full * kPanelVectors + ceil_div((panel - full) * rest, panels - full)) * VL;
  }
  int vectors_of(int64_t panel) const { return static_cast<int>((first(panel + 1) - first(panel)) / VL); }
};

// A product's result as tasks: by panels of its rows and, where what is left of these does not divide over the threads, by its
// columns, as long as a piece is worth preparing its panel again.
inline int64_t choose_pieces(int64_t rows, int64_t columns, int64_t threads, Pieces& pieces) {
  const PanelSplit split(rows, threads, true);
  const int64_t rest = split.panels - split.full;
  pieces.threads = threads;
  pieces.of_columns = split.by_columns ? larger(1, smaller(threads, columns / (4 * VL))) : 1;
  return split.full + rest * pieces.of_columns;
}

// One of them: rows [m, m + count), which are so many vectors of lanes, and columns [begin, end).
struct PanelPiece {
  int64_t m, count, begin, end;
  int vectors;
  PanelPiece(int64_t rows, int64_t columns, const Pieces& pieces, int64_t task) {
    const PanelSplit split(rows, pieces.threads, true);
    const int64_t cut = task < split.full ? 1 : pieces.of_columns, blocks = ceil_div(columns, VL);
    const int64_t panel = task < split.full ? task : split.full + (task - split.full) / cut;
    const int64_t piece = task < split.full ? 0 : (task - split.full) % cut;
    m = split.first(panel);
    count = smaller(split.first(panel + 1), rows) - m;
    vectors = split.vectors_of(panel);
    begin = piece * blocks / cut * VL;
    end = smaller((piece + 1) * blocks / cut * VL, columns);
  }
};

template <class F>
CROSSVIT_INLINE void with_vectors(int nv, F f) {
  switch (nv) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    default: return f.template operator()<3>();
  }
}

// Takes aligned pieces from a task's scratch; with a null base it only measures.
struct Arena {
  char* base;
  int64_t used = 0;
  float* floats(int64_t n) {
    const int64_t at = used;
    used += round_up(n * 4, 64);
    return base ? reinterpret_cast<float*>(base + at) : nullptr;
  }
};

}  // namespace crossvit::CROSSVIT_ISA
