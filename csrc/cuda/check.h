// The torch side of the CUDA kernels: what every <op>.cpp needs between the dispatcher's tensors and a launch function's
// struct. Names no CUDA header: device and stream are reached through c10's virtual guard, so the same objects serve CPU
// tensors in the emulation.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/ScalarType.h>
#include <torch/library.h>

#include <cstdint>
#include <string>

#include "arguments.h"
#include "cuda/device.h"
#include "cuda/rows.h"
#include "cuda/types.h"
#include "schemas.h"
#include "views.h"

namespace crossvit::cuda {

using c10::DeviceGuard;  // DeviceGuard guard(x.device()); while it lives that device is the current one

// The tensors that the kernels take: on a GPU, or on the CPU in the emulation.
inline Taken taken() { return {runs_on_gpu() ? c10::DeviceType::CUDA : c10::DeviceType::CPU, /*float16=*/true}; }

// cudaStream_t of the current stream of the tensor's device; null on a CPU, for the emulation.
Stream stream_of(const Tensor& t);

// Throws, with the kernel's name, where a launch function returned an error.
void check(Error error, const char* kernel);

// Whether float32 products may be computed in TF32: torch's setting for matrix products.
bool allow_tf32();

// Whether 16-byte accesses may walk it: base address, strides of all leading dimensions and width are multiples of 16 bytes.
bool aligned_to_16(const Tensor& t);

// Rows as the kernels take them; the tensor has to outlive the launch call only.
Rows rows_of(const RowTensor& t);

// Defines an op of crossvit_kernels_cuda. Each <op>.cpp does it for its own functions:
//   TORCH_LIBRARY_FRAGMENT(crossvit_kernels_cuda, m) {
//     crossvit::cuda::define(m, crossvit::schema::patch_embed, TORCH_FN(crossvit::cuda::patch_embed));
//   }
template <class Function>
void define(torch::Library& library, const std::string& schema, Function function) {
  library.def(schema.c_str(), torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, function));
}

}  // namespace crossvit::cuda
