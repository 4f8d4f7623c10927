// The torch side of the CUDA kernels: what every <op>.cpp needs between the dispatcher's tensors and a launch function's
// struct. Names no CUDA header: device and stream are reached through c10's virtual guard, so the same objects serve CPU
// tensors in the emulation.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/ScalarType.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <string>

#include "arguments.h"
#include "cuda/device.h"
#include "cuda/rows.h"
#include "cuda/types.h"
#include "schemas.h"

namespace crossvit::cuda {

using at::Tensor;
using c10::DeviceGuard;  // DeviceGuard guard(x.device()); while it lives that device is the current one
using OptionalTensor = std::optional<Tensor>;

// The tensors that the kernels take: on a GPU, or on the CPU in the emulation.
inline Taken taken() { return {runs_on_gpu() ? c10::DeviceType::CUDA : c10::DeviceType::CPU, /*float16=*/true}; }

// float32, float16 or bfloat16; others do not get here (arguments.h).
Type type_of(at::ScalarType dtype);
inline Type type_of(const Tensor& t) { return type_of(t.scalar_type()); }

// A contiguous 1-D parameter, or {} where there is none.
Vector vector_of(const OptionalTensor& t);

// cudaStream_t of the current stream of the tensor's device; null on a CPU, for the emulation.
Stream stream_of(const Tensor& t);

// Throws, with the kernel's name, where a launch function returned an error.
void check(Error error, const char* kernel);

// Whether float32 products may be computed in TF32: torch's setting for matrix products.
bool allow_tf32();

// Memory of the device of `like`, not initialised.
Tensor empty(at::IntArrayRef shape, at::ScalarType dtype, const Tensor& like);
inline Tensor empty_f32(at::IntArrayRef shape, const Tensor& like) { return empty(shape, at::kFloat, like); }

// A matrix (or a tensor of rows) whose last stride is 1; a copy where it was not.
Tensor dense_rows(const Tensor& t);

// Whether 16-byte accesses may walk it: base address, strides of all leading dimensions and width are multiples of 16 bytes.
bool aligned_to_16(const Tensor& t);

// A tensor (..., width) as `count` rows: row i begins at data + (i / inner) * outer_stride + (i % inner) * stride, in
// elements. The tensor itself where two strides say where its rows lie, else a contiguous copy that this owns.
struct RowTensor {
  Tensor tensor;
  std::int64_t count = 0, width = 0, inner = 1, stride = 0, outer_stride = 0;
  Type type = Type::float32;
  bool aligned = false;  // aligned_to_16

  RowTensor() = default;
  explicit RowTensor(const Tensor& t);
  const void* data() const { return tensor.const_data_ptr(); }
  void* mutable_data() const { return tensor.mutable_data_ptr(); }
  Rows rows() const;  // as kernels take them; the memory has to outlive the launch call only
};

// Defines an op of crossvit_kernels_cuda. Each <op>.cpp does it for its own functions:
//   TORCH_LIBRARY_FRAGMENT(crossvit_kernels_cuda, m) {
//     crossvit::cuda::define(m, crossvit::schema::patch_embed, TORCH_FN(crossvit::cuda::patch_embed));
//   }
template <class Function>
void define(torch::Library& library, const std::string& schema, Function function) {
  library.def(schema.c_str(), torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, function));
}

}  // namespace crossvit::cuda
