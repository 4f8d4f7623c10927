// Where the kernels of this library run; no torch and no CUDA header.
#pragma once

namespace crossvit::cuda {

// Compiled by nvcc, on a GPU; by the C++ compiler, on the CPU, in the emulation.
bool runs_on_gpu();

}  // namespace crossvit::cuda
