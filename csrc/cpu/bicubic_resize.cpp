// bicubic_resize on the CPU: images at another size (resize.h), and their gradient.
#include "image_arguments.h"
#include "ops.h"
#include "taps.h"

namespace crossvit {

namespace {

Tensor bicubic_resize(const BicubicResize& a) {
  const ResizedImages from(a.images, a.height, a.width);
  const Tensor out = empty({a.images.size(0), a.images.size(1), a.height, a.width}, a.images.scalar_type());
  launch(active().resize, ResizeArgs{from.images, a.images.size(0), out.data_ptr()});
  return out;
}

Tensor bicubic_resize_backward(const BicubicResizeBackward& a) {
  const Tensor grad = a.grad_out.contiguous();
  ResizedImages to(empty(a.images.sizes(), a.images.scalar_type()), a.height, a.width);
  launch(active().resize_grad, ImagesGradArgs{to.images, a.images.size(0), grad.const_data_ptr()});
  return std::move(to.tensor);
}

const Library of_bicubic_resize = ops().define<bicubic_resize>().define<bicubic_resize_backward>();

}  // namespace

}  // namespace crossvit
