#include "cuda/check.h"

namespace crossvit {

// On a GPU, or on the CPU in the emulation.
Taken taken() { return {cuda::runs_on_gpu() ? kCUDA : kCPU, /*float16=*/true}; }

namespace cuda {

void check(Error error, const char* kernel) {
  require(error == nullptr, "the CUDA kernel ", kernel, " was not launched: ", error ? error : "");
}

bool aligned_to_16(const Tensor& t) {
  const std::int64_t size = t.itemsize();
  const auto divides = [size](std::int64_t elements) { return elements * size % 16 == 0; };
  if (reinterpret_cast<std::uintptr_t>(t.const_data_ptr()) % 16 != 0 || t.stride(-1) != 1 || !divides(t.size(-1)))
    return false;
  for (std::int64_t d = 0; d + 1 < t.dim(); d++)
    if (t.size(d) > 1 && !divides(t.stride(d))) return false;
  return true;
}

int size_of(std::int64_t size) {
  require(size < std::int64_t{1} << 30, "rows of ", size, " elements");
  return static_cast<int>(size);
}

Rows rows_of(const RowTensor& t) {
  if (!t.data) return {};
  const std::int64_t size = dtype_of(t.dtype) == DType::float32 ? 4 : 2;
  const auto divides = [size](std::int64_t elements) { return elements * size % 16 == 0; };
  const bool several = t.per_batch > 1, batches = t.per_batch < t.count;
  Rows result{.data = t.data,
              .dtype = dtype_of(t.dtype),
              .aligned = reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0 && divides(t.width) &&
                         (!several || divides(t.row_stride)) && (!batches || divides(t.batch_stride)),
              .row_stride = t.row_stride};
  if (batches) {
    require(t.count < std::int64_t{1} << 32, "a view of ", t.count, " rows with two strides; make it contiguous");
    result.tokens = static_cast<std::uint32_t>(t.per_batch);
    result.batch_stride = t.batch_stride;
  }
  return result;
}

const Library of_memory = ops().define<fill_empty_with_nan>("fill_empty_with_nan(bool fill) -> ()");

}  // namespace cuda

}  // namespace crossvit
