// What the launch functions and their callers share; no torch and no CUDA header.
#pragma once

#include <cstdint>

#include "plain.h"

namespace crossvit::cuda {

// What a launch function returns: null, or why the launch failed.
using Error = const char*;

// cudaStream_t, for those who do not see CUDA's headers.
using Stream = void*;

}  // namespace crossvit::cuda
