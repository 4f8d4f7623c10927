// The operands of a weight's gradient, left (out, rows) times right (rows, in), as the kernels that meet the rows leave them
// and weight_grad.h reads them. Both are cut into blocks of rows. A block of left holds [out][row]; one of right holds
// strips of columns, [strip][row][column], each the panel of a product. As bfloat16 two rows share a lane of right.
#pragma once

#include "gemm.h"

namespace crossvit::CROSSVIT_ISA {

constexpr int64_t kStrip = kPanelVectors * VL;  // columns in a strip of right
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

// Features [e, e + columns) of rows [m, m + count), which come as a panel of `lanes`, into a left operand. Lanes behind the
// last row become zero.
template <int NV>
inline void write_left(void* operand, const OperandShape& shape, int64_t m, int64_t count, int64_t e, int64_t columns,
                       const float* panel) {
  constexpr int64_t lanes = NV * VL;
  for (int64_t v = 0; v * VL < count; v++) {
    char* to = static_cast<char*>(operand) + shape.left(m + v * VL, e);
    const int64_t stride = shape.block_rows * shape.element, here = smaller(count - v * VL, VL);
    for (int64_t j = 0; j < columns; j++, to += stride) {
      Vec values = load(panel + j * lanes + v * VL);
      if (here < VL)
        for (int64_t r = here; r < VL; r++) values[r] = 0.0f;
      if (shape.pairs())
        store(reinterpret_cast<uint16_t*>(to), values);
      else
        store(reinterpret_cast<float*>(to), values);
    }
  }
}

// Rows [m, m + count) into a right operand: row(r, k, n) gives n values from column k on of row m + r. m is even.
template <class Row>
CROSSVIT_INLINE void write_right(void* operand, const OperandShape& shape, int64_t m, int64_t count, Row row) {
  char* base = static_cast<char*>(operand);
  for (int64_t r = 0; r < count; r += shape.pairs() ? 2 : 1)
    for (int64_t strip = 0; strip < shape.features; strip += kStrip) {
      float* to = reinterpret_cast<float*>(base + shape.right(m + r, strip));
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
