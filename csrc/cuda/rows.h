// Matrices in global memory as kernels take them: rows that may be strided views. No torch and no CUDA header.
#pragma once

#include <cstdint>

#include "types.h"

namespace crossvit::cuda {

// Rows of adjacent elements. Row r begins at r * row_stride where `tokens` is 0, else at
// r / tokens * batch_stride + r % tokens * row_stride (in elements), and there are less than 2^32 rows.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::float32;
  bool aligned = false;  // every row begins at a multiple of 16 bytes
  std::uint32_t tokens = 0;
  std::int64_t batch_stride = 0;
  std::int64_t row_stride = 0;
};

}  // namespace crossvit::cuda
