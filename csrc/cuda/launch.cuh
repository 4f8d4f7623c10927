// Launches a kernel on a stream and reports what the launch says; nothing here waits for the GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "types.h"

namespace crossvit::cuda {

// Null, or what is wrong.
inline Error describe(cudaError_t status) { return status == cudaSuccess ? nullptr : cudaGetErrorString(status); }

// kernel(arguments...) over `grid` blocks of `threads` threads with `shared` bytes of dynamic shared memory. An empty grid
// is no launch.
template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t shared, Stream stream,
             const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  if (shared > 48 * 1024) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (status != cudaSuccess) return describe(status);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  return describe(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, std::size_t shared, Stream stream,
             const Arguments&... arguments) {
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), threads, shared, stream, arguments...);
}

// The multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Bytes that a block can have on the current device.
inline int shared_memory_of_a_block() {
  int device = 0, bytes = 48 * 1024;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

}  // namespace crossvit::cuda
