// What the torch side and the kernels of both devices share; no torch and no CUDA header.
#pragma once

namespace crossvit {

// Element types. The CPU's kernels know float32 and bfloat16.
enum class DType : int { float32, float16, bfloat16 };

// A contiguous vector of parameters; absent where data is null.
struct Vector {
  const void* data = nullptr;
  DType dtype = DType::float32;
};

}  // namespace crossvit
