// Where the kernels of this library run; no torch and no CUDA header.
#pragma once

#include <cstdint>

#include "types.h"

namespace crossvit::cuda {

// Compiled by nvcc, on a GPU; by the C++ compiler, on the CPU, in the emulation.
bool runs_on_gpu();

// While it lives, the GPU of this index is the current one of PyTorch and of CUDA.
class DeviceGuard {
 public:
  explicit DeviceGuard(std::int32_t index);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  void* guard_ = nullptr;
};

// The stream that PyTorch launches on there; null in the emulation.
Stream current_stream(std::int32_t index);

}  // namespace crossvit::cuda
