#include "cuda/check.h"

#include <ATen/Context.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace crossvit::cuda {

Stream stream_of(const Tensor& t) {
  if (t.device().is_cpu()) return nullptr;
  return c10::impl::VirtualGuardImpl(t.device().type()).getStream(t.device()).native_handle();
}

void check(Error error, const char* kernel) {
  TORCH_CHECK(error == nullptr, "the CUDA kernel ", kernel, " was not launched: ", error);
}

bool allow_tf32() { return at::globalContext().allowTF32CuBLAS(); }

bool aligned_to_16(const Tensor& t) {
  const auto divides = [&t](std::int64_t elements) { return elements * t.itemsize() % 16 == 0; };
  if (reinterpret_cast<std::uintptr_t>(t.const_data_ptr()) % 16 != 0 || t.stride(-1) != 1 || !divides(t.size(-1)))
    return false;
  for (std::int64_t d = 0; d + 1 < t.dim(); d++)
    if (t.size(d) > 1 && !divides(t.stride(d))) return false;
  return true;
}

Rows rows_of(const RowTensor& t) {
  Rows result;
  result.data = const_cast<void*>(t.tensor.const_data_ptr());
  result.dtype = dtype_of(t.tensor);
  result.aligned = aligned_to_16(t.tensor);
  result.row_stride = t.row_stride;
  if (t.per_batch < t.count) {
    TORCH_CHECK(t.count < std::int64_t{1} << 32, "a view of ", t.count, " rows with two strides; make it contiguous");
    result.tokens = static_cast<std::uint32_t>(t.per_batch);
    result.batch_stride = t.batch_stride;
  }
  return result;
}

}  // namespace crossvit::cuda
