// A Linear over the few rows of a batch of CLS tokens.
#pragma once

#include "launch.h"

namespace crossvit {

// [residual +] Linear(pre_act(norm(x))) over the rows of x, as a tensor of this dtype.
inline Tensor linear_rows(const Tensor& x, const Norm& norm, bool gelu_in, const Tensor& weight,
                          const OptionalTensor& bias, const Tensor& residual, ScalarType dtype) {
  const RowTensor in(x);
  const WeightTensor matrix(weight);
  const Tensor out = empty({x.size(0), weight.size(0)}, dtype);
  LinearArgs args{};
  args.x = rows_of(in);
  args.out = rows_of(RowTensor(out));
  if (residual.defined()) args.residual = rows_of(RowTensor(residual));
  args.rows = in.count;
  args.in = x.size(-1);
  args.out_features = weight.size(0);
  args.norm = norm;
  args.gelu_in = gelu_in;
  args.weight = matrix.matrix;
  args.bias = vector_of(bias);
  launch(active().linear, args);
  return out;
}

}  // namespace crossvit
