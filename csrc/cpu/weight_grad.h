// The gradients of a Linear's weight and bias from the operands that grad.h leaves (operands.h): a chunk of the weight a task,
// all rows running through it, so that no two tasks add to the same memory.
#pragma once

#include "operands.h"

namespace crossvit::CROSSVIT_ISA {

struct WeightGradScratch : Scratch<WeightGradArgs, WeightGradPlan> {
  int64_t strip_floats = round_up(plan.out_chunk, VL) * kStrip;
  float* c = floats(ceil_div(plan.in_chunk, kStrip) * strip_floats);
  float* bias = floats(larger(plan.out_chunk, round_up(plan.in_chunk, kStrip)));
};

inline WeightGradPlan weight_grad_plan(const WeightGradArgs& a, int64_t threads) {
  constexpr int64_t most_in = 8 * kStrip, most_out = 96;
  const int64_t in_chunks = ceil_div(a.in, most_in);
  WeightGradPlan plan;
  plan.in_chunk = round_up(ceil_div(a.in, in_chunks), kStrip);
  int64_t out_chunks = larger(ceil_div(a.out, most_out), ceil_div(4 * threads, in_chunks));
  out_chunks = smaller(out_chunks, ceil_div(a.out, 2 * kBlock));
  plan.out_chunk = round_up(ceil_div(a.out, out_chunks), kBlock);
  plan.tasks = ceil_div(a.out, plan.out_chunk) * ceil_div(a.in, plan.in_chunk);
  return plan;
}

// to[e] += sum over the rows of a block of left.
inline void add_left_rows(const char* left, const OperandShape& shape, int64_t block, int64_t e0, int64_t out,
                          float* to) {
  const int64_t rows = shape.rows_of(block);
  for (int64_t e = 0; e < out; e++) {
    const char* from = left + shape.left(block * shape.block_rows, e0 + e);
    Vec total{};
    for (int64_t r = 0; r < rows; r += VL)
      total += shape.pairs() ? load(reinterpret_cast<const Bf16*>(from) + r)
                             : load(reinterpret_cast<const float*>(from) + r);
    to[e] += sum(total);
  }
}

// to[k] += sum over the rows of a block of right.
inline void add_right_rows(const char* right, const OperandShape& shape, int64_t block, int64_t k0, int64_t in,
                           float* to) {
  const int64_t steps = shape.pairs() ? ceil_div(shape.rows_of(block), 2) : shape.rows_of(block);
  for (int64_t k = 0; k < in; k += VL) {
    const float* from = reinterpret_cast<const float*>(right + shape.right(block * shape.block_rows, k0 + k));
    Vec even{}, odd{};
    for (int64_t s = 0; s < steps; s++) {
      const Vec lanes = load(from + s * kStrip);
      if (shape.pairs()) {
        even += even_of(lanes);
        odd += odd_of(lanes);
      } else {
        even += lanes;
      }
    }
    store(to + k, load(to + k) + (even + odd));
  }
}

// c[e][column] (+)= left right over one block of rows, for kBlock rows of left and one strip of right.
template <int NV>
inline void weight_grad_tile(const char* left, int64_t stride, int64_t count, const float* right, int64_t steps,
                             __attribute__((unused)) bool pairs, bool overwrite, float* c) {
  ScatteredRows row;
  NothingAhead nothing;
  for (int e = 0; e < kBlock; e++) row.row[e] = left + smaller(e, count - 1) * stride;
#if defined(CROSSVIT_DOT_BF16)
  if (pairs) {
    if (overwrite) return tile<MultiplyBf16, NV, false>(row, right, kStrip, steps, c, kStrip, nothing);
    return tile<MultiplyBf16, NV, true>(row, right, kStrip, steps, c, kStrip, nothing);
  }
#endif
  if (overwrite) return tile<MultiplyF32, NV, false>(row, right, kStrip, steps, c, kStrip, nothing);
  tile<MultiplyF32, NV, true>(row, right, kStrip, steps, c, kStrip, nothing);
}

// The finished chunk: element (e, k) of the product to row e or, transposed, to row k of the weight's gradient.
inline void store_weight_grad(const WeightGradArgs& a, const WeightGradScratch& s, int64_t e0, int64_t out, int64_t k0,
                              int64_t in) {
  const DType dtype = a.grad_weight.dtype;
  const int64_t stride = a.grad_weight.row_stride * size_of(dtype);
  char* to = static_cast<char*>(a.grad_weight.data) + (a.transposed ? k0 : e0) * stride;
  for (int64_t k = 0; k < in; k += VL) {
    const float* c = s.c + k / kStrip * s.strip_floats + k % kStrip;
    const int n = lanes_in(in - k);
    if (!a.transposed) {
      for (int64_t e = 0; e < out; e++) store_as(dtype, to + e * stride, k0 + k, load(c + e * kStrip), n);
      continue;
    }
    for (int64_t e = 0; e < out; e += VL)
      for_each_row<1>(c + e * kStrip, kStrip, n, [&](int64_t r, Vec values) {
        store_as(dtype, to + (k + r) * stride, e0 + e, values, lanes_in(out - e));
      });
  }
}

inline void weight_grad_run(const WeightGradArgs& a, const WeightGradPlan& plan, int64_t task,
                            const WeightGradScratch& s) {
  const OperandShape left(a.rows, a.out, a.products), right(a.rows, a.in, a.products);
  const int64_t in_chunks = ceil_div(a.in, plan.in_chunk);
  const int64_t k0 = task % in_chunks * plan.in_chunk, in = smaller(a.in - k0, plan.in_chunk);
  const int64_t e0 = task / in_chunks * plan.out_chunk, out = smaller(a.out - e0, plan.out_chunk);
  const char *left_data = static_cast<const char*>(a.left), *right_data = static_cast<const char*>(a.right);
  const bool want_bias = a.grad_bias && (a.transposed ? e0 : k0) == 0;
  const int64_t bias_first = a.transposed ? k0 : e0, bias_count = a.transposed ? in : out;
  if (want_bias)
    for (int64_t i = 0; i < round_up(bias_count, VL); i++) s.bias[i] = 0.0f;

  for (int64_t block = 0; block < left.blocks; block++) {
    if (want_bias) {
      if (a.transposed)
        add_right_rows(right_data, right, block, k0, in, s.bias);
      else
        add_left_rows(left_data, left, block, e0, out, s.bias);
    }
    if (!a.grad_weight.data) continue;
    const int64_t steps = left.pairs() ? ceil_div(left.rows_of(block), 2) : left.rows_of(block);
    const int64_t stride = left.block_rows * left.element;
    const char* rows = left_data + left.left(block * left.block_rows, e0);
    for (int64_t k = 0; k < in; k += kStrip) {
      const float* strip = reinterpret_cast<const float*>(right_data + right.right(block * right.block_rows, k0 + k));
      with_vectors(static_cast<int>(ceil_div(smaller(in - k, kStrip), VL)), [&]<int NV>() {
        for (int64_t e = 0; e < out; e += kBlock)
          weight_grad_tile<NV>(rows + e * stride, stride, out - e, strip, steps, left.pairs(), block == 0,
                               s.c + k / kStrip * s.strip_floats + e * kStrip);
      });
    }
  }
  if (a.grad_weight.data) store_weight_grad(a, s, e0, out, k0, in);
  for (int64_t i = 0; want_bias && i < bias_count; i++) {
    if (a.grad_bias_dtype == DType::float32)
      static_cast<float*>(a.grad_bias)[bias_first + i] = s.bias[i];
    else
      static_cast<Bf16*>(a.grad_bias)[bias_first + i] = narrow(s.bias[i]);
  }
}

}  // namespace crossvit::CROSSVIT_ISA
