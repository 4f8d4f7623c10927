// What the launch functions and their callers share; no torch and no CUDA header.
#pragma once

#include <cstdint>

#include "plain.h"

namespace crossvit::cuda {

// A vector to be written, of any type; null where it is not wanted.
struct Target {
  void* data = nullptr;
  DType dtype = DType::float32;
};

// What a launch function returns: null, or why the launch failed.
using Error = const char*;

// cudaStream_t, for those who do not see CUDA's headers.
using Stream = void*;

}  // namespace crossvit::cuda
