// Tells the two libraries apart that the same objects of C++ are linked into (csrc/build_cuda.py). On a GPU device and stream are
// PyTorch's, by functions of its stable C interface that only its builds with CUDA have, so that only the library for GPUs asks
// for them.
#include "cuda/device.h"

#ifdef __CUDACC__

#include <stdexcept>

extern "C" {
std::int32_t aoti_torch_create_cuda_guard(std::int32_t device_index, void** guard);
std::int32_t aoti_torch_delete_cuda_guard(void* guard);
std::int32_t aoti_torch_get_current_cuda_stream(std::int32_t device_index, void** stream);
}

namespace crossvit::cuda {

bool runs_on_gpu() { return true; }

DeviceGuard::DeviceGuard(std::int32_t index) {
  if (aoti_torch_create_cuda_guard(index, &guard_) != 0) throw std::runtime_error("PyTorch does not enter the GPU");
}
DeviceGuard::~DeviceGuard() { aoti_torch_delete_cuda_guard(guard_); }

Stream current_stream(std::int32_t index) {
  Stream stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(index, &stream) != 0) throw std::runtime_error("PyTorch gives no stream");
  return stream;
}

}  // namespace crossvit::cuda

#else

namespace crossvit::cuda {

bool runs_on_gpu() { return false; }

DeviceGuard::DeviceGuard(std::int32_t) {}
DeviceGuard::~DeviceGuard() = default;

Stream current_stream(std::int32_t) { return nullptr; }

}  // namespace crossvit::cuda

#endif
