// Patch embedding: a matrix product whose rows are the patches of images, cut out and resized as they are read.
// Launch functions and what they take; no torch and no CUDA header.
#pragma once

#include <cstdint>

#include "cuda/rows.h"
#include "cuda/types.h"

namespace crossvit::cuda {

// Images (batch, channels, height, width), bicubically resized where `resize`, and their patches: patch m is patch
// m % per_image of image m / per_image, with `depth` pixels (channel, row, column) that count as a row of a matrix.
struct PatchImages {
  const void* data = nullptr;
  DType dtype = DType::float32;  // the matrix operand's, or float32
  std::int64_t batch_stride = 0, channel_stride = 0, row_stride = 0, column_stride = 0;
  int height = 0, width = 0;
  bool resize = false;
  float row_scale = 1, column_scale = 1;  // a pixel of the images for one of the resized ones
  int resized_height = 0, resized_width = 0;
  int piece = 0;  // so many neighbouring pixels of a patch, 4 or 8, may be moved at once; 0: one by one
  int patch = 0, depth = 0;
  std::uint32_t per_row = 0, per_image = 0;
};

struct PatchEmbedArgs {
  PatchImages images;
  std::uint32_t patches = 0;  // in all images
  int features = 0;
  Rows weight;           // (features, depth), of the matrix operand's type
  Vector bias;           // (features), or null
  Vector cls;            // (features)
  Vector position;       // (1 + per_image, features)
  Target out;            // (batch, 1 + per_image, features), of the weight's type or float32
  bool aligned = false;  // rows of position and out begin at multiples of 16 bytes
  bool tf32 = false;
};
Error launch_patch_embed(const PatchEmbedArgs& args, Stream stream);

// grad^T patches, (features, depth), in `pieces` parts of the patches that are still to be added: (pieces, features, depth).
struct PatchWeightGradientArgs {
  PatchImages images;
  std::uint32_t patches = 0;
  int features = 0;
  Rows grad;                     // (patches, features), of the matrix operand's type or float32
  DType dtype = DType::float32;  // of the matrix operands
  bool tf32 = false;
  float* partial = nullptr;
  int pieces = 1;  // what patch_weight_gradient_pieces() says
};
int patch_weight_gradient_pieces(const PatchWeightGradientArgs& args);
Error launch_patch_weight_gradient(const PatchWeightGradientArgs& args, Stream stream);

// grad weight, every pixel to its place in `out`: contiguous images (batch, channels, height, width) of whole patches.
struct PatchImagesGradientArgs {
  PatchImages out;
  std::uint32_t patches = 0;
  int features = 0;
  Rows grad;    // (patches, features), of the weight's type or float32
  Rows weight;  // (features, depth)
  bool tf32 = false;
};
Error launch_patch_images_gradient(const PatchImagesGradientArgs& args, Stream stream);

// The gradient of a bicubic resize along an axis: grad (outer, resized, inner), float32, to out (outer, size, inner).
struct ResizeGradientArgs {
  const float* grad = nullptr;
  Target out;
  std::int64_t outer = 0;
  int size = 0, resized = 0, inner = 0;
};
Error launch_resize_gradient(const ResizeGradientArgs& args, Stream stream);

}  // namespace crossvit::cuda
