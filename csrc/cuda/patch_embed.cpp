// The torch side of patch_embed.
#include "cuda/patch_embed.h"

#include <algorithm>

#include "cuda/check.h"
#include "cuda/matrix_sum.h"

namespace crossvit::cuda {

namespace {

// Images and the size that they are resized to; owns what their data points to.
struct Images {
  Tensor tensor;
  PatchImages images;
  std::int64_t patches;

  // To be read beside the weight; images of a third type, neither float32 nor the weight's, become float32.
  Images(const Tensor& given, const Tensor& weight, std::int64_t height, std::int64_t width)
      : Images(given.scalar_type() == weight.scalar_type() ? given : given.to(kFloat32), weight.size(3), height,
               width) {}

  Images(Tensor given, std::int64_t patch, std::int64_t height, std::int64_t width) : tensor(std::move(given)) {
    if (tensor.size(3) * tensor.stride(3) >= std::int64_t{1} << 31) tensor = tensor.contiguous();
    images.data = tensor.const_data_ptr();
    images.dtype = dtype_of(tensor);
    images.batch_stride = tensor.stride(0);
    images.channel_stride = tensor.stride(1);
    images.row_stride = tensor.stride(2);
    images.column_stride = tensor.stride(3);
    images.height = static_cast<int>(tensor.size(2));
    images.width = static_cast<int>(tensor.size(3));
    images.resize = tensor.size(2) != height || tensor.size(3) != width;
    images.row_scale = static_cast<float>(tensor.size(2)) / static_cast<float>(height);
    images.column_scale = static_cast<float>(tensor.size(3)) / static_cast<float>(width);
    images.resized_height = static_cast<int>(height);
    images.resized_width = static_cast<int>(width);
    images.patch = static_cast<int>(patch);
    images.depth = static_cast<int>(tensor.size(1) * patch * patch);
    images.per_row = static_cast<std::uint32_t>(width / patch);
    images.per_image = static_cast<std::uint32_t>(height / patch * (width / patch));
    if (move_together(4)) images.piece = 4;
    if (tensor.itemsize() == 2 && move_together(8)) images.piece = 8;
    patches = tensor.size(0) * images.per_image;
    require(patches + tensor.size(0) < std::int64_t{1} << 31 &&
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

}  // namespace

Tensor patch_embed(const Tensor& images, const Tensor& weight, const OptionalTensor& bias, const Tensor& cls_token,
                   const Tensor& pos_embed, int64_t height, int64_t width, bool tf32) {
  arguments::patch_embed(taken(), images, weight, bias, cls_token, pos_embed, height, width);
  const Call call(images, tf32);
  const Images cut(images, weight, height, width);
  const std::int64_t features = weight.size(0);
  const Tensor matrix = as_matrix(weight);
  const Tensor cls = cls_token.contiguous(), position = pos_embed.contiguous();
  const auto dtype = promoted(promoted(weight.scalar_type(), cls.scalar_type()), position.scalar_type());
  const Tensor out =
      empty({images.size(0), 1 + static_cast<std::int64_t>(cut.images.per_image), features}, dtype, images);
  PatchEmbedArgs args;
  args.images = cut.images;
  args.patches = static_cast<std::uint32_t>(cut.patches);
  args.features = static_cast<int>(features);
  args.weight = rows_of(RowTensor(matrix));
  args.bias = vector_of(bias);
  args.cls = vector_of(cls);
  args.position = vector_of(position);
  args.out = out.mutable_data_ptr();
  args.out_dtype = dtype_of(out);
  args.aligned =
      aligned_to_16(out.view({-1, features})) && aligned_to_16(position.view({-1, features})) && features % 8 == 0;
  args.tf32 = call.tf32;
  check(launch_patch_embed(args, call.stream), "patch_embed");
  return out;
}

namespace {

Tensor patch_images_gradient(const Call& call, const RowTensor& grad, const Tensor& images, const Tensor& weight,
                             std::int64_t height, std::int64_t width) {
  const bool resize = images.size(2) != height || images.size(3) != width;
  const std::int64_t planes = images.size(0) * images.size(1);
  // This is the gradient of the resized images, where images are resized.
  Tensor pixels =
      empty({images.size(0), images.size(1), height, width}, resize ? kFloat32 : images.scalar_type(), images);
  PatchImagesGradientArgs args;
  const Images cut(pixels, weight.size(3), height, width);
  args.out = cut.images;
  args.patches = static_cast<std::uint32_t>(cut.patches);
  args.features = static_cast<int>(weight.size(0));
  args.grad = rows_of(grad);
  const Tensor matrix = as_matrix(weight);
  args.weight = rows_of(RowTensor(matrix));
  args.tf32 = call.tf32;
  check(launch_patch_images_gradient(args, call.stream), "patch_images_gradient");
  const auto resize_back = [&](const Tensor& out, std::int64_t outer, std::int64_t size, std::int64_t resized,
                               std::int64_t inner) {
    ResizeGradientArgs axis;
    axis.grad = static_cast<const float*>(pixels.const_data_ptr());
    axis.out = out.mutable_data_ptr();
    axis.out_dtype = dtype_of(out);
    axis.outer = outer;
    axis.size = static_cast<int>(size);
    axis.resized = static_cast<int>(resized);
    axis.inner = static_cast<int>(inner);
    check(launch_resize_gradient(axis, call.stream), "resize_gradient");
    pixels = out;
  };
  if (resize) {
    resize_back(empty_f32({images.size(0), images.size(1), images.size(2), width}, images), planes, images.size(2),
                height, width);
    resize_back(empty(images.sizes(), images.scalar_type(), images), planes * images.size(2), images.size(3), width, 1);
  }
  return pixels;
}

Tensor patch_weight_gradient(const Call& call, const RowTensor& grad, const Tensor& images, const Tensor& weight,
                             std::int64_t height, std::int64_t width) {
  const Images cut(images, weight, height, width);
  PatchWeightGradientArgs args;
  args.images = cut.images;
  args.patches = static_cast<std::uint32_t>(cut.patches);
  args.features = static_cast<int>(weight.size(0));
  args.grad = rows_of(grad);
  args.dtype = dtype_of(weight);
  args.tf32 = call.tf32;
  args.pieces = patch_weight_gradient_pieces(args);
  const Tensor result = empty(weight.sizes(), weight.scalar_type(), weight);
  const bool whole = args.pieces == 1 && weight.scalar_type() == kFloat32;  // nothing is left to add or to round
  const Tensor partial = whole ? result : empty_f32({args.pieces, weight.numel()}, weight);
  args.partial = static_cast<float*>(partial.mutable_data_ptr());
  check(launch_patch_weight_gradient(args, call.stream), "patch_weight_gradient");
  if (whole) return result;
  MatrixSumArgs sum;
  sum.matrices = vector_of(partial);
  sum.aligned = weight.numel() % 4 == 0;
  sum.count = args.pieces;
  sum.stride = sum.width = weight.numel();
  sum.all = result.mutable_data_ptr();
  sum.all_dtype = dtype_of(result);
  check(matrix_sum(sum, call.stream), "matrix_sum");
  return result;
}

// The gradients of bias, cls_token and pos_embed, those that are needed: sums over the batch, and for the bias over patches.
void append_sums(const Call& call, const Tensor& grad_out, const OptionalTensor& bias, const Tensor& weight,
                 const Tensor& cls_token, const Tensor& pos_embed, bool needs_bias, bool needs_cls, bool needs_position,
                 std::vector<Tensor>& result) {
  const std::int64_t tokens = grad_out.size(1), features = grad_out.size(2);
  const auto four_together = [&](std::int64_t elements) { return elements % 4 == 0; };
  MatrixSumArgs args;
  args.matrices = {grad_out.const_data_ptr(), dtype_of(grad_out)};
  args.count = grad_out.size(0);
  args.stride = grad_out.stride(0);
  args.rows = needs_bias || needs_position ? tokens : 1;
  args.row_stride = grad_out.stride(1);
  args.width = args.first_size = features;
  args.aligned = reinterpret_cast<std::uintptr_t>(grad_out.const_data_ptr()) % (4 * grad_out.itemsize()) == 0 &&
                 four_together(features) && four_together(args.stride) && four_together(args.row_stride);
  Tensor sums;
  if (needs_bias) {
    result.push_back(empty({features}, bias ? bias->scalar_type() : weight.scalar_type(), grad_out));
    sums = empty_f32({tokens, features}, grad_out);
    args.sums = static_cast<float*>(sums.mutable_data_ptr());
  }
  const Tensor grad_bias = needs_bias ? result.back() : Tensor();
  if (needs_cls) {
    result.push_back(empty(cls_token.sizes(), cls_token.scalar_type(), grad_out));
    args.first = result.back().mutable_data_ptr();
    args.first_dtype = dtype_of(cls_token);
  }
  if (needs_position) {
    result.push_back(empty(pos_embed.sizes(), pos_embed.scalar_type(), grad_out));
    args.all = result.back().mutable_data_ptr();
    args.all_dtype = dtype_of(pos_embed);
  }
  check(matrix_sum(args, call.stream), "matrix_sum");
  if (!needs_bias) return;
  MatrixSumArgs over;
  over.matrices = {args.sums + features, DType::float32};
  over.aligned = four_together(features);
  over.count = tokens - 1;
  over.stride = over.width = features;
  over.all = grad_bias.mutable_data_ptr();
  over.all_dtype = dtype_of(grad_bias);
  check(matrix_sum(over, call.stream), "matrix_sum");
}

}  // namespace

std::vector<Tensor> patch_embed_backward(const Tensor& grad_out, const Tensor& images, const Tensor& weight,
                                         const OptionalTensor& bias, const Tensor& cls_token, const Tensor& pos_embed,
                                         int64_t height, int64_t width, NeedsList list, bool tf32) {
  const auto needs = arguments::patch_embed_backward(taken(), grad_out, images, weight, bias, cls_token, pos_embed,
                                                     height, width, list);
  const Call call(images, tf32);
  const Tensor dense = dense_rows(grad_out);
  std::vector<Tensor> result;
  if (needs.images || needs.weight) {
    // A matrix operand: of the weight's type, or float32.
    const Tensor patches = dense.narrow(1, 1, dense.size(1) - 1);
    const bool fits = patches.scalar_type() == weight.scalar_type() || patches.scalar_type() == kFloat32;
    const RowTensor grad(fits ? patches : patches.to(kFloat32));
    if (needs.images) result.push_back(patch_images_gradient(call, grad, images, weight, height, width));
    if (needs.weight) result.push_back(patch_weight_gradient(call, grad, images, weight, height, width));
  }
  if (needs.bias || needs.cls_token || needs.pos_embed) {
    append_sums(call, dense, bias, weight, cls_token, pos_embed, needs.bias, needs.cls_token, needs.pos_embed, result);
  }
  return result;
}

const Library of_patch_embed = ops()
                                   .define<patch_embed>(schema::patch_embed.cuda())
                                   .define<patch_embed_backward>(schema::patch_embed_backward.cuda());

}  // namespace crossvit::cuda
