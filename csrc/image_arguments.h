// The native ops as in arguments.h: those of images.
#pragma once

#include "arguments.h"

namespace crossvit {

// --- bicubic_resize, on the CPU alone: images (B, C, H, W) --------------------------------------------------------------

inline void expect_resized(const Expect& expect, const Tensor& images, int64_t height, int64_t width) {
  expect.rank("images", images, 4);
  expect.side("images' height", images.sizes()[2]);
  expect.side("images' width", images.sizes()[3]);
  expect.side("height", height);
  expect.side("width", width);
}

struct BicubicResize {
  static constexpr const char* schema = "bicubic_resize(Tensor images, int height, int width) -> Tensor";
  const Tensor& images;
  int64_t height, width;

  void check() const { expect_resized(Expect(schema, "images", images), images, height, width); }
};

struct BicubicResizeBackward {
  static constexpr const char* schema =
      "bicubic_resize_backward(Tensor grad_out, Tensor images, int height, int width) -> Tensor";
  const Tensor &grad_out, &images;
  int64_t height, width;

  void check() const {
    const Expect expect(schema, "images", images);
    expect_resized(expect, images, height, width);
    expect.tensor("grad_out", grad_out, {images.sizes()[0], images.sizes()[1], height, width}, images.scalar_type());
  }
};

// --- patch_embed: images (B, C, H, W), weight (D, C, P, P), pos_embed (1, 1 + N, D) --------------------------------------

struct PatchEmbed {
  static constexpr const char* schema =
      "patch_embed(Tensor images, Tensor weight, Tensor? bias, Tensor cls_token, Tensor pos_embed, int height, int "
      "width) -> Tensor";
  const Tensor& images;
  LinearParams linear;
  const Tensor &cls_token, &pos_embed;
  int64_t height, width;

  void check() const { check(Expect(schema, "images", images)); }
  // Gives the number of tokens of an image, 1 + N.
  int64_t check(const Expect& expect) const {
    expect_resized(expect, images, height, width);
    const Tensor& weight = linear.weight;
    expect.rank("weight", weight, 4);
    const int64_t features = weight.sizes()[0], patch = weight.sizes()[3];
    expect.tensor("weight", weight, {features, images.sizes()[1], patch, patch});
    if (height % patch != 0) [[unlikely]]
      expect.fail("height", "a multiple of the patch's " + std::to_string(patch), std::to_string(height));
    if (width % patch != 0) [[unlikely]]
      expect.fail("width", "a multiple of the patch's " + std::to_string(patch), std::to_string(width));
    const int64_t all = 1 + (height / patch) * (width / patch);
    expect.vector("bias", linear.bias, features);
    expect.tensor("cls_token", cls_token, {1, 1, features});
    expect.tensor("pos_embed", pos_embed, {1, all, features});
    expect.countable("images", images.sizes()[0], all);
    expect.countable("images", images.sizes()[0] * all, weight.numel() / features);
    expect.countable("weight", images.sizes()[0] * all, features);
    return all;
  }
};

struct PatchEmbedNeeds {
  bool images = false, weight = false, bias = false, cls_token = false, pos_embed = false;
};

struct PatchEmbedBackward {
  static constexpr const char* schema =
      "patch_embed_backward(Tensor grad_out, Tensor images, Tensor weight, Tensor? bias, Tensor cls_token, Tensor "
      "pos_embed, int height, int width, bool[] needs) -> Tensor[]";
  const Tensor& grad_out;
  PatchEmbed forward;
  Needs<PatchEmbedNeeds> needs;

  void check() const {
    const Expect expect(schema, "images", forward.images);
    const int64_t all = forward.check(expect);
    expect.tensor("grad_out", grad_out, {forward.images.sizes()[0], all, forward.linear.weight.sizes()[0]});
    expect.needs(needs);
    expect.needed("bias", needs.bias, forward.linear.bias);
  }
};

}  // namespace crossvit
