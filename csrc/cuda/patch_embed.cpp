// The torch side of patch_embed.
#include "cuda/patch_embed.h"

#include <algorithm>

#include "cuda/check.h"
#include "cuda/matrix_sum.h"
#include "image_arguments.h"

namespace crossvit::cuda {

namespace {

// Images and the size that they are resized to; owns what their data points to.
struct Images {
  Tensor tensor;
  PatchImages images;
  std::uint32_t patches;

  // To be read beside the weight; images of a third type, neither float32 nor the weight's, become float32.
  Images(const Tensor& given, const Tensor& weight, std::int64_t height, std::int64_t width)
      : Images(given.scalar_type() == weight.scalar_type() ? given : given.to(kFloat32), weight.size(3), height,
               width) {}

  Images(Tensor given, std::int64_t patch, std::int64_t height, std::int64_t width) : tensor(std::move(given)) {
    if (tensor.size(3) * tensor.stride(3) >= std::int64_t{1} << 31) tensor = tensor.contiguous();
    images = {.data = tensor.const_data_ptr(),
              .dtype = dtype_of(tensor),
              .batch_stride = tensor.stride(0),
              .channel_stride = tensor.stride(1),
              .row_stride = tensor.stride(2),
              .column_stride = tensor.stride(3),
              .height = static_cast<int>(tensor.size(2)),
              .width = static_cast<int>(tensor.size(3)),
              .resize = tensor.size(2) != height || tensor.size(3) != width,
              .row_scale = static_cast<float>(tensor.size(2)) / static_cast<float>(height),
              .column_scale = static_cast<float>(tensor.size(3)) / static_cast<float>(width),
              .resized_height = static_cast<int>(height),
              .resized_width = static_cast<int>(width),
              .patch = static_cast<int>(patch),
              .depth = static_cast<int>(tensor.size(1) * patch * patch),
              .per_row = static_cast<std::uint32_t>(width / patch),
              .per_image = static_cast<std::uint32_t>(height / patch * (width / patch))};
    if (move_together(4)) images.piece = 4;
    if (tensor.itemsize() == 2 && move_together(8)) images.piece = 8;
    const std::int64_t all = tensor.size(0) * images.per_image;
    patches = static_cast<std::uint32_t>(all);
    require(all + tensor.size(0) < std::int64_t{1} << 31 &&
                std::max({tensor.size(2), tensor.size(3), height, width}) < std::int64_t{1} << 24,
            "patch_embed's CUDA kernels count patches in 32 bits");
  }

 private:
  // Whether `pixels` neighbours of a patch are adjacent in memory and aligned to their size.
  bool move_together(std::int64_t pixels) const {
    bool together = images.column_stride == 1 && images.patch % pixels == 0 &&
                    reinterpret_cast<std::uintptr_t>(images.data) % (pixels * tensor.itemsize()) == 0;
    for (int d = 0; d < 3; d++) together = together && (tensor.size(d) == 1 || tensor.stride(d) % pixels == 0);
    return together;
  }
};

// The weight (D, C, P, P) as the matrix (D, C * P * P).
Tensor as_matrix(const Tensor& weight) { return weight.contiguous().view({weight.size(0), -1}); }

Tensor patch_embed(const PatchEmbed& a, bool tf32) {
  const Call call(a.images, tf32);
  const Tensor& weight = a.linear.weight;
  const Images cut(a.images, weight, a.height, a.width);
  const std::int64_t features = weight.size(0);
  const Tensor matrix = as_matrix(weight), cls = a.cls_token.contiguous(), position = a.pos_embed.contiguous();
  const auto dtype = promoted(promoted(weight.scalar_type(), cls.scalar_type()), position.scalar_type());
  const Tensor out = empty({a.images.size(0), position.size(1), features}, dtype, a.images);
  const PatchEmbedArgs args{.images = cut.images,
                            .patches = cut.patches,
                            .features = static_cast<int>(features),
                            .weight = rows_of(matrix),
                            .bias = vector_of(a.linear.bias),
                            .cls = vector_of(cls),
                            .position = vector_of(position),
                            .out = target_of(out),
                            .aligned = aligned_to_16(out.view({-1, features})) &&
                                       aligned_to_16(position.view({-1, features})) && features % 8 == 0,
                            .tf32 = tf32};
  check(launch_patch_embed(args, call.stream), "patch_embed");
  return out;
}

Tensor patch_images_gradient(const Call& call, const RowTensor& grad, const PatchEmbed& a) {
  const Tensor &images = a.images, &weight = a.linear.weight;
  const bool resize = images.size(2) != a.height || images.size(3) != a.width;
  const std::int64_t planes = images.size(0) * images.size(1);
  // This is the gradient of the resized images, where images are resized.
  Tensor pixels =
      empty({images.size(0), images.size(1), a.height, a.width}, resize ? kFloat32 : images.scalar_type(), images);
  const Images cut(pixels, weight.size(3), a.height, a.width);
  const Tensor matrix = as_matrix(weight);
  const PatchImagesGradientArgs args{cut.images,    cut.patches,     static_cast<int>(weight.size(0)),
                                     rows_of(grad), rows_of(matrix), call.tf32};
  check(launch_patch_images_gradient(args, call.stream), "patch_images_gradient");
  const auto resize_back = [&](const Tensor& out, std::int64_t outer, std::int64_t size, std::int64_t resized,
                               std::int64_t inner) {
    const ResizeGradientArgs axis{float_data(pixels),        target_of(out),         outer, static_cast<int>(size),
                                  static_cast<int>(resized), static_cast<int>(inner)};
    check(launch_resize_gradient(axis, call.stream), "resize_gradient");
    pixels = out;
  };
  if (resize) {
    resize_back(empty_f32({images.size(0), images.size(1), images.size(2), a.width}, images), planes, images.size(2),
                a.height, a.width);
    resize_back(empty(images.sizes(), images.scalar_type(), images), planes * images.size(2), images.size(3), a.width,
                1);
  }
  return pixels;
}

Tensor patch_weight_gradient(const Call& call, const RowTensor& grad, const PatchEmbed& a) {
  const Tensor& weight = a.linear.weight;
  const Images cut(a.images, weight, a.height, a.width);
  PatchWeightGradientArgs args{.images = cut.images,
                               .patches = cut.patches,
                               .features = static_cast<int>(weight.size(0)),
                               .grad = rows_of(grad),
                               .dtype = dtype_of(weight),
                               .tf32 = call.tf32};
  args.pieces = patch_weight_gradient_pieces(args);
  const Tensor result = empty(weight.sizes(), weight.scalar_type(), weight);
  const bool whole = args.pieces == 1 && weight.scalar_type() == kFloat32;  // nothing is left to add or to round
  const Tensor partial = whole ? result : empty_f32({args.pieces, weight.numel()}, weight);
  args.partial = float_data(partial);
  check(launch_patch_weight_gradient(args, call.stream), "patch_weight_gradient");
  if (whole) return result;
  const MatrixSumArgs sum{.matrices = vector_of(partial),
                          .aligned = weight.numel() % 4 == 0,
                          .count = args.pieces,
                          .stride = weight.numel(),
                          .width = weight.numel(),
                          .all = target_of(result)};
  check(matrix_sum(sum, call.stream), "matrix_sum");
  return result;
}

// The gradients of bias, cls_token and pos_embed, those that are needed: sums over the batch, and for the bias over patches.
void append_sums(const Call& call, const Tensor& grad_out, const PatchEmbed& a, const PatchEmbedNeeds& needs,
                 std::vector<Tensor>& result) {
  const std::int64_t tokens = grad_out.size(1), features = grad_out.size(2);
  const auto four_together = [&](std::int64_t elements) { return elements % 4 == 0; };
  const auto target = [&](const Tensor& like, bool wanted) {
    return wanted ? target_of(result.emplace_back(empty(like.sizes(), like.scalar_type(), grad_out))) : Target{};
  };
  Tensor grad_bias, sums;
  if (needs.bias) {
    const ScalarType dtype = a.linear.bias ? a.linear.bias->scalar_type() : a.linear.weight.scalar_type();
    grad_bias = result.emplace_back(empty({features}, dtype, grad_out));
    sums = empty_f32({tokens, features}, grad_out);
  }
  const MatrixSumArgs over_batch{
      .matrices = {grad_out.const_data_ptr(), dtype_of(grad_out)},
      .aligned = reinterpret_cast<std::uintptr_t>(grad_out.const_data_ptr()) % (4 * grad_out.itemsize()) == 0 &&
                 four_together(features) && four_together(grad_out.stride(0)) && four_together(grad_out.stride(1)),
      .count = grad_out.size(0),
      .stride = grad_out.stride(0),
      .rows = needs.bias || needs.pos_embed ? tokens : 1,
      .row_stride = grad_out.stride(1),
      .width = features,
      .first_size = features,
      .first = target(a.cls_token, needs.cls_token),
      .all = target(a.pos_embed, needs.pos_embed),
      .sums = float_data(sums)};
  check(matrix_sum(over_batch, call.stream), "matrix_sum");
  if (!needs.bias) return;
  const MatrixSumArgs over_patches{.matrices = {over_batch.sums + features, DType::float32},
                                   .aligned = four_together(features),
                                   .count = tokens - 1,
                                   .stride = features,
                                   .width = features,
                                   .all = target_of(grad_bias)};
  check(matrix_sum(over_patches, call.stream), "matrix_sum");
}

std::vector<Tensor> patch_embed_backward(const PatchEmbedBackward& a, bool tf32) {
  const Call call(a.forward.images, tf32);
  const ScalarType dtype = a.forward.linear.weight.scalar_type();
  const Tensor dense = dense_rows(a.grad_out);
  std::vector<Tensor> result;
  if (a.needs.images || a.needs.weight) {
    // A matrix operand: of the weight's type, or float32.
    const Tensor patches = dense.narrow(1, 1, dense.size(1) - 1);
    const bool fits = patches.scalar_type() == dtype || patches.scalar_type() == kFloat32;
    const RowTensor grad(fits ? patches : patches.to(kFloat32));
    if (a.needs.images) result.push_back(patch_images_gradient(call, grad, a.forward));
    if (a.needs.weight) result.push_back(patch_weight_gradient(call, grad, a.forward));
  }
  if (a.needs.bias || a.needs.cls_token || a.needs.pos_embed) append_sums(call, dense, a.forward, a.needs, result);
  return result;
}

const Library of_patch_embed = ops().define<patch_embed>().define<patch_embed_backward>();

}  // namespace

}  // namespace crossvit::cuda
