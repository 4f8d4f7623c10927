// What the launch functions and their callers share; no torch and no CUDA header.
#pragma once

#include <cstdint>

namespace crossvit::cuda {

enum class Type : int { float32, float16, bfloat16 };

// A vector whose element type is known at run time; data may be null where the argument is optional.
struct Vector {
  const void* data = nullptr;
  Type type = Type::float32;
};

// What a launch function returns: null, or why the launch failed.
using Error = const char*;

// cudaStream_t, for those who do not see CUDA's headers.
using Stream = void*;

}  // namespace crossvit::cuda
