// The torch side of patch_embed.
#include "cuda/patch_embed.h"

#include <algorithm>

#include "cuda/check.h"

namespace crossvit::cuda {

namespace {

// Images and the size that they are resized to; owns what their data points to.
struct Images {
  Tensor tensor;
  PatchImages images;
  std::int64_t patches;

  // Those of a third type, neither float32 nor the weight's, become float32.
  Images(const Tensor& given, const Tensor& weight, std::int64_t height, std::int64_t width)
      : tensor(given.scalar_type() == weight.scalar_type() ? given : given.to(at::kFloat)) {
    const std::int64_t patch = weight.size(3);
    images.data = tensor.const_data_ptr();
    images.type = type_of(tensor);
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
    TORCH_CHECK(patches + tensor.size(0) < std::int64_t{1} << 31 &&
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

}  // namespace

Tensor patch_embed(const Tensor& images, const Tensor& weight, const OptionalTensor& bias, const Tensor& cls_token,
                   const Tensor& pos_embed, int64_t height, int64_t width) {
  const DeviceGuard guard(images.device());
  const Images cut(images, weight, height, width);
  const std::int64_t features = weight.size(0);
  const Tensor matrix = weight.contiguous().view({features, -1});
  const Tensor cls = cls_token.contiguous(), position = pos_embed.contiguous();
  const auto dtype =
      c10::promoteTypes(c10::promoteTypes(weight.scalar_type(), cls.scalar_type()), position.scalar_type());
  const Tensor out =
      empty({images.size(0), 1 + static_cast<std::int64_t>(cut.images.per_image), features}, dtype, images);
  PatchEmbedArgs args;
  args.images = cut.images;
  args.patches = static_cast<std::uint32_t>(cut.patches);
  args.features = static_cast<int>(features);
  args.weight = RowTensor(matrix).rows();
  args.bias = vector_of(bias);
  args.cls = vector_of(cls);
  args.position = vector_of(position);
  args.out = out.mutable_data_ptr();
  args.out_type = type_of(out);
  args.aligned =
      aligned_to_16(out.view({-1, features})) && aligned_to_16(position.view({-1, features})) && features % 8 == 0;
  args.tf32 = allow_tf32();
  check(launch_patch_embed(args, stream_of(images)), "patch_embed");
  return out;
}

}  // namespace crossvit::cuda

TORCH_LIBRARY_FRAGMENT(crossvit_kernels_cuda, m) {
  using namespace crossvit;
  cuda::define(m, schema::patch_embed, TORCH_FN(cuda::patch_embed));
}
