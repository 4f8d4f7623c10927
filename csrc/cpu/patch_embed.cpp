// patch_embed on the CPU: resize, patches, projection, CLS token and positions over panels of patches, and the
// gradients (patch.h, grad.h).
#include "launch.h"
#include "ops.h"
#include "taps.h"
#include "torch_c/aten.h"

#include <vector>

namespace crossvit {

namespace {

// Images and the size they are resized to; owns the taps, and a contiguous copy of images whose rows are not dense.
struct ResizedImages {
  Tensor tensor;
  bool resize;
  AxisTaps rows, columns;
  PatchImages images{};
  int64_t patches;

  ResizedImages(const Tensor& t, int64_t height, int64_t width, int64_t patch)
      : tensor(t.stride(3) == 1 || t.size(3) == 1 ? t : t.contiguous()),
        resize(t.size(2) != height || t.size(3) != width),
        rows(t.size(2), height, resize),
        columns(t.size(3), width, resize) {
    images.data = const_cast<void*>(tensor.const_data_ptr());
    images.dtype = dtype_of(tensor);
    images.batch_stride = tensor.stride(0);
    images.channel_stride = tensor.stride(1);
    images.row_stride = tensor.stride(2);
    images.extent = 1;
    for (int64_t d = 0; d < 4; d++) images.extent += (tensor.size(d) - 1) * tensor.stride(d);
    images.channels = tensor.size(1);
    images.patch = patch;
    images.per_row = width / patch;
    images.per_image = height / patch * images.per_row;
    images.resize = resize;
    images.rows = rows.taps;
    images.columns = columns.taps;
    patches = tensor.size(0) * images.per_image;
  }
};

// The weight (D, C, P, P) as the matrix (D, C * P * P).
Tensor as_matrix(const Tensor& weight) { return weight.contiguous().view({weight.size(0), -1}); }

}  // namespace

Tensor patch_embed(const Tensor& images, const Tensor& weight, const OptionalTensor& bias, const Tensor& cls_token,
                   const Tensor& pos_embed, int64_t height, int64_t width) {
  arguments::patch_embed(kTaken, images, weight, bias, cls_token, pos_embed, height, width);
  const ResizedImages resized(images, height, width, weight.size(3));
  const int64_t features = weight.size(0), patches = resized.images.per_image;
  const WeightTensor matrix(as_matrix(weight));
  const Tensor cls = cls_token.contiguous(), positions = pos_embed.contiguous();
  const auto dtype = promoted(promoted(weight.scalar_type(), cls.scalar_type()), positions.scalar_type());
  const Tensor out = empty({images.size(0), 1 + patches, features}, dtype);

  // Row 0 of what (rows, features) tensors hold, and the rows behind it, once per image.
  const auto first_row = [&](const Tensor& t, int64_t batch_stride) {
    return Rows{const_cast<void*>(t.const_data_ptr()), dtype_of(t), 1, batch_stride, 0};
  };
  const auto other_rows = [&](const Tensor& t, int64_t batch_stride) {
    char* data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
    return Rows{t.numel() ? data + features * t.itemsize() : data, dtype_of(t), patches, batch_stride, features};
  };
  PatchEmbedArgs args{};
  args.images = resized.images;
  args.patches = resized.patches;
  args.out_features = features;
  args.weight = matrix.matrix;
  args.bias = vector_of(bias);
  args.positions = other_rows(positions, 0);
  args.out = other_rows(out, out.stride(0));
  args.cls_token = first_row(cls, 0);
  args.cls_position = first_row(positions, 0);
  args.cls_out = first_row(out, out.stride(0));
  launch(active().patch_embed, args);
  return out;
}

std::vector<Tensor> patch_embed_backward(const Tensor& grad_out, const Tensor& images, const Tensor& weight,
                                         const OptionalTensor& bias, const Tensor& cls_token, const Tensor& pos_embed,
                                         int64_t height, int64_t width, NeedsList list, bool wide) {
  const auto needs = arguments::patch_embed_backward(kTaken, grad_out, images, weight, bias, cls_token, pos_embed,
                                                     height, width, list);
  const ResizedImages resized(images, height, width, weight.size(3));
  const Tensor matrix = as_matrix(weight);
  const RowTensor grad(grad_out.narrow(1, 1, resized.images.per_image));
  std::vector<Tensor> result;
  if (needs.images) {
    const Tensor rows = input_gradient(grad, {resized.patches, matrix.size(1)}, matrix);
    const ResizedImages written(empty(images.sizes(), images.scalar_type()), height, width, weight.size(3));
    PatchGradImagesArgs args{written.images, images.size(0), float_data(rows)};
    launch(active().patch_grad_images, args);
    result.push_back(written.tensor);
  }
  if (needs.weight || needs.bias) {
    Tensor rows;
    if (needs.weight) {
      rows = empty_f32({resized.patches, matrix.size(1)});
      PatchRowsArgs args{resized.images, resized.patches, float_data(rows)};
      launch(active().patch_rows, args);
    }
    LinearGradArgs args{};
    args.grad = rows_of(grad);
    if (needs.weight) args.x = rows_of(RowTensor(rows));
    args.rows = resized.patches;
    for (Tensor& gradient :
         linear_gradients(args, rows, matrix, {}, {}, bias ? bias->scalar_type() : weight.scalar_type(), wide,
                          {.weight = needs.weight, .bias = needs.bias}))
      result.push_back(gradient);
    if (needs.weight) {
      Tensor& grad_weight = result[needs.images ? 1 : 0];
      grad_weight = grad_weight.view(weight.sizes());
    }
  }
  if (needs.cls_token)
    result.push_back(aten::sum(grad_out.narrow(1, 0, 1), {0}, true, kFloat32).to(cls_token.scalar_type()));
  if (needs.pos_embed) result.push_back(aten::sum(grad_out, {0}, true, kFloat32).to(pos_embed.scalar_type()));
  return result;
}

}  // namespace crossvit
