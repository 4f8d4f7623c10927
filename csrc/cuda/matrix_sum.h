// The sum of matrices; no torch and no CUDA header.
#pragma once

#include <cstdint>

#include "cuda/types.h"

namespace crossvit::cuda {

// The sum of `count` matrices (rows, width) of any type: row r of matrix i begins at i * stride + r * row_stride. All of it
// goes to `all` and `sums`, its first `first_size` elements to `first` and the others to `second`, where these are not null.
struct MatrixSumArgs {
  Vector matrices;
  bool aligned = false;  // four elements lie together and are aligned to their size, wherever they begin
  std::int64_t count = 0, stride = 0, rows = 1, row_stride = 0, width = 0, first_size = 0;
  Target first, second, all;
  float* sums = nullptr;
};
Error matrix_sum(const MatrixSumArgs& args, Stream stream);

}  // namespace crossvit::cuda
