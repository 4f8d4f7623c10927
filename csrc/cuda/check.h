// The torch side of the CUDA kernels: what every <op>.cpp needs between the dispatcher's tensors and a launch function's
// struct. Names no CUDA header, and the device only by device.h, so the same objects serve CPU tensors in the emulation.
#pragma once

#include <cstdint>
#include <string>

#include "arguments.h"
#include "cuda/device.h"
#include "cuda/rows.h"
#include "cuda/types.h"
#include "views.h"

namespace crossvit::cuda {

// What the launches of a call of an op have in common, as long as the call lasts: their GPU, that of its main tensor, which is the
// current one meanwhile; their stream; and whether float32 products may be computed in TF32.
struct Call {
  DeviceGuard guard;
  Stream stream;
  bool tf32;

  Call(const Tensor& main, bool allow_tf32)
      : guard(main.device().index), stream(current_stream(main.device().index)), tf32(allow_tf32) {}
};

// Throws, with the kernel's name, where a launch function returned an error.
void check(Error error, const char* kernel);

// Whether 16-byte accesses may walk it: base address, strides of all leading dimensions and width are multiples of 16 bytes.
bool aligned_to_16(const Tensor& t);

// Rows as the kernels take them, none of what has no memory; the tensor, contiguous or as a RowTensor, has to outlive the launch
// call only.
Rows rows_of(const RowTensor& t);
inline Rows rows_of(const Tensor& t) { return t.numel() ? rows_of(RowTensor(t)) : Rows{}; }

inline Target target_of(const Tensor& t) { return t.defined() ? Target{t.data_ptr(), dtype_of(t)} : Target{}; }

// A size of a matrix, which kernels count in 32 bits.
int size_of(std::int64_t size);

// The ops of crossvit_kernels_cuda (arguments.h), which each <op>.cpp defines for its own functions.
inline Library ops() { return {"crossvit_kernels_cuda", "CompositeExplicitAutograd", ", bool tf32=False"}; }

}  // namespace crossvit::cuda
