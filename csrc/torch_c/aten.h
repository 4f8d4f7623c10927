// The few functions of PyTorch that backward passes call, each with the result, to the bit, that PyTorch's own has.
#pragma once

#include "torch_c/tensor.h"

namespace crossvit::aten {

Tensor gelu(const Tensor& t);
// Over these dimensions, in `dtype` where one is given.
Tensor sum(const Tensor& t, Sizes dims, bool keep = false, std::optional<ScalarType> dtype = {});
Tensor mean(const Tensor& t, Sizes dims, bool keep = false);
Tensor mul(const Tensor& a, const Tensor& b);

// On the CPU alone: a + alpha * b; a product with a number; (M, K) x (K, N), and that for each of a batch.
Tensor add(const Tensor& a, const Tensor& b, double alpha = 1);
Tensor mul(const Tensor& a, double b);
Tensor mm(const Tensor& a, const Tensor& b);
Tensor bmm(const Tensor& a, const Tensor& b);

}  // namespace crossvit::aten
