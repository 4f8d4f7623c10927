// Rows of a tensor into panels, whose lanes they become, and back: transposed and converted.
#pragma once

#include "gemm.h"

namespace crossvit::CROSSVIT_ISA {

constexpr int64_t kPrefetchBlocks = 8;  // blocks of columns by which a load of rows runs ahead

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
#pragma GCC unroll 16
        for (int r = 0; r < VL; r++) block[r] = load(from[r] + i);
      } else {
#pragma GCC unroll 16
        for (int r = 0; r < VL; r++) block[r] = r < here ? load_n(from[r] + i, static_cast<int>(n)) : Vec{};
      }
      transpose(block);
      if (n == VL) {
#pragma GCC unroll 16
        for (int j = 0; j < VL; j++) store(to + (i + j) * lanes + r0, block[j]);
      } else {
        float corner[VL * VL];
#pragma GCC unroll 16
        for (int j = 0; j < VL; j++) store(corner + j * VL, block[j]);
        for (int64_t j = 0; j < n; j++) store(to + (i + j) * lanes + r0, load(corner + j * VL));
      }
    }
  }
}
inline void load_transposed(const Rows& rows, int64_t m, int64_t count, int64_t k, int64_t depth, float* to,
                            int64_t lanes) {
  if (rows.dtype == DType::float32)
    load_transposed_as<float>(rows, m, count, k, depth, to, lanes);
  else
    load_transposed_as<Bf16>(rows, m, count, k, depth, to, lanes);
}

// Hands every row of c (columns x lanes, at most VL columns) to use(row, values of the columns).
template <int NV, class Use>
CROSSVIT_INLINE void for_each_row(const float* c, int64_t ldc, int64_t count, Use use) {
#pragma GCC unroll 16
  for (int v = 0; v < NV; v++) {
    if (v * VL >= count) break;
    Vec block[VL];
#pragma GCC unroll 16
    for (int e = 0; e < VL; e++) block[e] = load(c + e * ldc + v * VL);
    transpose(block);
    float row[VL * VL];
#pragma GCC unroll 16
    for (int r = 0; r < VL; r++) store(row + r * VL, block[r]);
    const int64_t here = smaller(count - v * VL, VL);
    for (int64_t r = 0; r < here; r++) use(v * VL + r, load(row + r * VL));
  }
}

// n values from a column of a row on, as floats and back.
CROSSVIT_INLINE Vec load_as(DType dtype, const char* row, int64_t column, int n) {
  if (dtype == DType::float32) {
    const float* f = reinterpret_cast<const float*>(row) + column;
    return n == VL ? load(f) : load_n(f, n);
  }
  const Bf16* h = reinterpret_cast<const Bf16*>(row) + column;
  return n == VL ? load(h) : load_n(h, n);
}
CROSSVIT_INLINE void store_as(DType dtype, char* row, int64_t column, Vec v, int n) {
  if (dtype == DType::float32) {
    float* f = reinterpret_cast<float*>(row) + column;
    n == VL ? store(f, v) : store_n(f, v, n);
  } else {
    Bf16* h = reinterpret_cast<Bf16*>(row) + column;
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
#pragma GCC unroll 16
    for (int e = 0; e < VL / 2; e++) {
      const float* at = c + 2 * e * ldc + v * VL;
      both[e] = pair(CROSSVIT_ISA::load(at) + bias[2 * e], CROSSVIT_ISA::load(at + ldc) + bias[2 * e + 1]);
    }
    transpose_halves(both);
    float rows[VL / 2 * VL];
#pragma GCC unroll 16
    for (int r = 0; r < VL / 2; r++) CROSSVIT_ISA::store(rows + r * VL, both[r]);
    const int64_t here = smaller(count - v * VL, VL);
    for (int64_t r = 0; r < here; r++)
      __builtin_memcpy(out.row[v * VL + r] + 2 * column, rows + r % (VL / 2) * VL + r / (VL / 2) * (VL / 2), 2 * VL);
  }
}

CROSSVIT_INLINE float element(const Vector& v, int64_t i) {
  return v.dtype == DType::float32 ? static_cast<const float*>(v.data)[i] : widen(static_cast<const Bf16*>(v.data)[i]);
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

}  // namespace crossvit::CROSSVIT_ISA
