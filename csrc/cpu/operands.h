// The operands of a weight's gradient, left (out, rows) times right (rows, in), as the kernels that meet the rows leave them
// and weight_grad.h reads them. Both are cut into blocks of rows. A block of left holds [out][row]; one of right holds
// strips of columns, [strip][row][column], each the panel of a product. As bfloat16 two rows share a lane of right.
#pragma once

#include "rows.h"

namespace crossvit::CROSSVIT_ISA {

constexpr int64_t kStrip = kPanelVectors * VL;  // columns in a strip of right
constexpr int64_t kWriteAhead = 4;              // rows of a strip by which a prefetch runs ahead of the writes
constexpr int64_t kRowSteps = 96;               // steps of a product in a block: such a strip stays in L1

struct OperandShape {
  int64_t rows, features, element;  // element: bytes
  int64_t blocks, block_rows;
  OperandShape(int64_t rows, int64_t features, DType products)
      : rows(rows), features(features), element(size_of(products)) {
    const int64_t most = kRowSteps * 4 / element;
    blocks = larger(1, ceil_div(rows, most));
    block_rows = round_up(ceil_div(rows, blocks), VL);
    blocks = larger(1, ceil_div(rows, block_rows));
  }
  bool pairs() const { return element == 2; }
  int64_t rows_of(int64_t block) const { return smaller(block_rows, rows - block * block_rows); }
  int64_t strips() const { return ceil_div(features, kStrip); }
  // Rows [row, row + VL) of feature e of a left operand; they lie in one block where row is a multiple of VL.
  int64_t left(int64_t row, int64_t e) const {
    return ((row / block_rows * features + e) * block_rows + row % block_rows) * element;
  }
  // Column k of a row (of a pair of rows: the even one) of a right operand.
  int64_t right(int64_t row, int64_t k) const {
    const int64_t strip = row / block_rows * strips() + k / kStrip;
    return (strip * block_rows + row % block_rows) * kStrip * element + k % kStrip * 4;
  }
  int64_t bytes() const { return blocks * block_rows * round_up(features, kStrip) * element; }
};

inline int64_t operand_bytes(int64_t rows, int64_t features, DType products) {
  return OperandShape(rows, features, products).bytes();
}

// Columns [k, k + depth) of rows of bfloat16, both even, as a panel of pairs: what lies side by side is a pair already.
inline void load_pairs(const Rows& rows, int64_t m, int64_t count, int64_t k, int64_t depth, float* to, int64_t lanes) {
  load_transposed_as<float>(rows, m, count, k / 2, depth / 2, to, lanes);
}
CROSSVIT_INLINE Vec even_of(Vec pairs) { return (Vec)((UVec)pairs << 16); }
CROSSVIT_INLINE Vec odd_of(Vec pairs) { return (Vec)((UVec)pairs & 0xffff0000u); }

// Where features from e on of the VL rows from `row` on begin in a left operand.
struct LeftRows {
  char* to;
  int64_t stride;  // bytes from feature to feature
  LeftRows(void* operand, const OperandShape& shape, int64_t row, int64_t e)
      : to(static_cast<char*>(operand) + shape.left(row, e)), stride(shape.block_rows * shape.element) {}
  // Asks for the memory of features [0, columns) while products keep the core busy.
  CROSSVIT_INLINE void prefetch(int64_t columns) const {
    for (int64_t j = 0; j < columns; j++) __builtin_prefetch(to + j * stride, 1);
  }
};

// Features [e, e + columns) of rows [m, m + count), which come as a panel of `lanes` (pairs: of pairs), into a left operand.
// Lanes behind the last row meet rows of zeros.
template <int NV>
inline void write_left(void* operand, const OperandShape& shape, int64_t m, int64_t count, int64_t e, int64_t columns,
                       const float* panel, bool pairs = false) {
  constexpr int64_t lanes = NV * VL;
  for (int64_t v = 0; v * VL < count; v++) {
    const LeftRows left(operand, shape, m + v * VL, e);
    const float* from = panel + v * VL;
    char* to = left.to;
    if (pairs)
      for (int64_t j = 0; j < columns; j += 2, from += lanes, to += 2 * left.stride) {
        store(reinterpret_cast<Bf16*>(to), even_of(load(from)));
        store(reinterpret_cast<Bf16*>(to + left.stride), odd_of(load(from)));
      }
    else if (shape.pairs())
      for (int64_t j = 0; j < columns; j++, from += lanes, to += left.stride)
        store(reinterpret_cast<Bf16*>(to), load(from));
    else
      for (int64_t j = 0; j < columns; j++, from += lanes, to += left.stride)
        store(reinterpret_cast<float*>(to), load(from));
  }
}

// Rows [m, m + count) into a right operand: row(r, k, n) gives n values from column k on of row m + r. m is even.
template <class Row>
CROSSVIT_INLINE void write_right(void* operand, const OperandShape& shape, int64_t m, int64_t count, Row row) {
  char* base = static_cast<char*>(operand);
  for (int64_t r = 0; r < count; r += shape.pairs() ? 2 : 1)
    for (int64_t strip = 0; strip < shape.features; strip += kStrip) {
      float* to = reinterpret_cast<float*>(base + shape.right(m + r, strip));
      for (int64_t k = 0; k < kStrip; k += 16) __builtin_prefetch(to + kWriteAhead * kStrip + k, 1);
      for (int64_t k = strip; k < strip + kStrip; k += VL, to += VL) {
        const int n = static_cast<int>(smaller(VL, shape.features - k));
        if (n <= 0) {
          store(to, Vec{});
          continue;
        }
        const Vec even = row(r, k, n);
        store(to, shape.pairs() ? pair(even, r + 1 < count ? row(r + 1, k, n) : Vec{}) : even);
      }
    }
}

}  // namespace crossvit::CROSSVIT_ISA
