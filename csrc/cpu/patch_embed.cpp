// patch_embed on the CPU: resize, patches, projection, CLS token and positions over panels of patches, and the
// gradients (patch.h, grad.h).
#include "image_arguments.h"
#include "ops.h"
#include "taps.h"
#include "torch_c/aten.h"

namespace crossvit {

namespace {

// The weight (D, C, P, P) as the matrix (D, C * P * P).
Tensor as_matrix(const Tensor& weight) { return weight.contiguous().view({weight.size(0), -1}); }

Tensor patch_embed(const PatchEmbed& a) {
  const Tensor& weight = a.linear.weight;
  const ResizedImages resized(a.images, a.height, a.width, weight.size(3));
  const int64_t features = weight.size(0), patches = resized.images.per_image;
  const WeightTensor matrix(as_matrix(weight));
  const Tensor cls = a.cls_token.contiguous(), positions = a.pos_embed.contiguous();
  const auto dtype = promoted(promoted(weight.scalar_type(), cls.scalar_type()), positions.scalar_type());
  const Tensor out = empty({a.images.size(0), 1 + patches, features}, dtype);

  // Row 0 of what (rows, features) tensors hold, and the rows behind it, once per image.
  const auto first_row = [&](const Tensor& t, int64_t batch_stride) {
    return Rows{t.data_ptr(), dtype_of(t), 1, batch_stride, 0};
  };
  const auto other_rows = [&](const Tensor& t, int64_t batch_stride) {
    char* data = t.data_ptr<char>();
    return Rows{data + features * t.itemsize(), dtype_of(t), patches, batch_stride, features};
  };
  launch(active().patch_embed, PatchEmbedArgs{.images = resized.images,
                                              .patches = resized.patches(),
                                              .out_features = features,
                                              .weight = matrix.matrix,
                                              .bias = vector_of(a.linear.bias),
                                              .positions = other_rows(positions, 0),
                                              .out = other_rows(out, out.stride(0)),
                                              .cls_token = first_row(cls, 0),
                                              .cls_position = first_row(positions, 0),
                                              .cls_out = first_row(out, out.stride(0))});
  return out;
}

std::vector<Tensor> patch_embed_backward(const PatchEmbedBackward& a, bool wide) {
  const auto& [images, linear, cls_token, pos_embed, height, width] = a.forward;
  const auto& [weight, bias] = linear;
  const ResizedImages resized(images, height, width, weight.size(3));
  const Tensor matrix = as_matrix(weight);
  const RowTensor grad(a.grad_out.narrow(1, 1, resized.images.per_image));
  std::vector<Tensor> result;
  if (a.needs.images) {
    const Tensor rows = input_gradient(grad, {resized.patches(), matrix.size(1)}, matrix);
    const ResizedImages written(empty(images.sizes(), images.scalar_type()), height, width, weight.size(3));
    launch(active().patch_grad_images, ImagesGradArgs{written.images, images.size(0), float_data(rows)});
    result.push_back(written.tensor);
  }
  if (a.needs.weight || a.needs.bias) {
    Tensor rows;
    if (a.needs.weight) {
      rows = empty_f32({resized.patches(), matrix.size(1)});
      launch(active().patch_rows, PatchRowsArgs{resized.images, resized.patches(), float_data(rows)});
    }
    auto gradients = linear_gradients({.grad = rows_of(grad), .x = rows_of(rows), .rows = resized.patches()}, rows,
                                      matrix, nullptr, bias ? bias->scalar_type() : weight.scalar_type(), wide,
                                      {.weight = a.needs.weight, .bias = a.needs.bias});
    if (a.needs.weight) gradients[0] = gradients[0].view(weight.sizes());
    result.insert(result.end(), gradients.begin(), gradients.end());
  }
  if (a.needs.cls_token)
    result.push_back(aten::sum(a.grad_out.narrow(1, 0, 1), {0}, true, kFloat32).to(cls_token.scalar_type()));
  if (a.needs.pos_embed) result.push_back(aten::sum(a.grad_out, {0}, true, kFloat32).to(pos_embed.scalar_type()));
  return result;
}

const Library of_patch_embed = ops().define<patch_embed>().define<patch_embed_backward>();

}  // namespace

}  // namespace crossvit
