// bicubic_resize on the CPU: images at another size (resize.h), and their gradient.
#include "launch.h"
#include "ops.h"
#include "taps.h"

namespace crossvit {

namespace {

// Images with dense rows, which are to become height x width; owns the taps.
struct ResizedPlanes {
  Tensor tensor;
  AxisTaps rows, columns;
  Images images{};

  ResizedPlanes(const Tensor& t, int64_t height, int64_t width)
      : tensor(t.stride(3) == 1 || t.size(3) == 1 ? t : t.contiguous()),
        rows(t.size(2), height),
        columns(t.size(3), width) {
    images = {const_cast<void*>(tensor.const_data_ptr()),
              dtype_of(tensor),
              tensor.stride(0),
              tensor.stride(1),
              tensor.stride(2),
              tensor.size(1),
              rows.taps,
              columns.taps};
  }
};

}  // namespace

Tensor bicubic_resize(const Tensor& images, int64_t height, int64_t width) {
  arguments::bicubic_resize(kTaken, images, height, width);
  const ResizedPlanes planes(images, height, width);
  const Tensor out = empty({images.size(0), images.size(1), height, width}, images.scalar_type());
  ResizeArgs args{planes.images, images.size(0), out.data_ptr()};
  launch(active().resize, args);
  return out;
}

Tensor bicubic_resize_backward(const Tensor& grad_out, const Tensor& images, int64_t height, int64_t width) {
  arguments::bicubic_resize_backward(kTaken, grad_out, images, height, width);
  const Tensor grad = grad_out.contiguous(), result = empty(images.sizes(), images.scalar_type());
  const ResizedPlanes planes(result, height, width);
  ResizeGradArgs args{planes.images, images.size(0), grad.const_data_ptr()};
  launch(active().resize_grad, args);
  return result;
}

}  // namespace crossvit
