// patch_embed on one panel of patches: resized, cut out and turned into the panel in scratch, multiplied, and stored
// with their positions; and the way back to the weight's and the images' gradients. A pixel of the resized images is
// made by the panel that uses it (resize.h).
#pragma once

#include "linear.h"
#include "resize.h"

namespace crossvit::CROSSVIT_ISA {

// Patches [column, column + patches) of row of patches `row` of one channel, resized: to[p * stride + py * patch + px].
template <bool near, class Pixel, class Element>
inline void resize_patches(const Images& a, const Pixel* plane, int64_t row, int64_t column, int64_t patches,
                           Element* to, int64_t stride, float* source) {
  const int64_t pitch = source_pitch(a);
  const int64_t begin = a.columns.first[column * a.patch], end = a.columns.first[(column + patches) * a.patch - 1] + 4;
  for (int64_t py = 0; py < a.patch; py++)
    resize_vertically(a, plane, row * a.patch + py, begin, end, source + py * pitch);
  for (int64_t p = 0; p < patches; p++)
    for (int64_t i = 0; i < a.patch; i += VL) {
      const int64_t px = vector_start(i, a.patch);
      const ColumnTaps taps(a.columns, (column + p) * a.patch + px);
      for (int64_t py = 0; py < a.patch; py++)
        store(to + p * stride + py * a.patch + px, taps.apply<near>(source + py * pitch));
    }
}

// The same where the images have their size already. Rows shorter than a vector are read with what lies behind them, as
// long as that is still the images' memory.
template <class Pixel, class Element>
inline void copy_patches(const Images& a, const Pixel* plane, int64_t row, int64_t column, int64_t patches, Element* to,
                         int64_t stride) {
  const Pixel* end = static_cast<const Pixel*>(a.data) + a.extent;
  for (int64_t py = 0; py < a.patch; py++) {
    const Pixel* from = plane + (row * a.patch + py) * a.row_stride + column * a.patch;
    for (int64_t p = 0; p < patches; p++, from += a.patch)
      for (int64_t i = 0; i < a.patch; i += VL) {
        const int64_t px = vector_start(i, a.patch);
        const bool whole = end - (from + px) >= VL;
        store(to + p * stride + py * a.patch + px,
              whole ? load(from + px) : load_n(from + px, static_cast<int>(a.patch)));
      }
  }
}

// Patches [m, m + count) of one channel, run by run of neighbours: to[r * stride + py * patch + px]. stride leaves room
// for a vector's overshoot.
template <class Pixel, class Element>
inline void gather_channel_as(const Images& a, int64_t m, int64_t count, int64_t channel, Element* to, int64_t stride,
                              float* source) {
  for (int64_t r = 0; r < count;) {
    const int64_t image = (m + r) / a.per_image, row = (m + r) % a.per_image / a.per_row, column = (m + r) % a.per_row;
    const int64_t patches = smaller(count - r, a.per_row - column);
    const Pixel* plane = static_cast<const Pixel*>(a.data) + image * a.batch_stride + channel * a.channel_stride;
    if (!a.resize)
      copy_patches(a, plane, row, column, patches, to + r * stride, stride);
    else if (taps_are_near(a.columns))
      resize_patches<true>(a, plane, row, column, patches, to + r * stride, stride, source);
    else
      resize_patches<false>(a, plane, row, column, patches, to + r * stride, stride, source);
    r += patches;
  }
}
template <class Element>
inline void gather_channel(const Images& a, int64_t m, int64_t count, int64_t channel, Element* to, int64_t stride,
                           float* source) {
  if (a.dtype == DType::float32)
    gather_channel_as<float>(a, m, count, channel, to, stride, source);
  else
    gather_channel_as<Bf16>(a, m, count, channel, to, stride, source);
}

// Elements from one gathered patch to the next.
inline int64_t gathered_stride(const Images& a) { return round_up(a.patch * a.patch, VL) + VL; }
inline int64_t source_floats(const Images& a) { return a.resize ? a.patch * source_pitch(a) : 0; }

struct PatchEmbedScratch : Scratch<PatchEmbedArgs, ProductPlan> {
  static constexpr int64_t lanes = kPanelVectors * VL;
  int64_t depth = a.images.channels * a.images.patch * a.images.patch;
  float* panel = floats((depth + VL) * lanes);  // a channel's last block may overshoot
  float* gathered = floats(gathered_stride(a.images) * lanes);
  float* source = floats(source_floats(a.images));
  float* c = floats(VL * lanes);
  float* widened = floats(kBlock * depth);
  float* bias = floats(a.out_features + VL);
};

// Patches [m, m + count) as a panel ready to be multiplied. Pairs are made while the pixels of a patch still lie side
// by side, so that half as much is transposed.
template <int NV>
inline Panel gather_panel(const Images& a, int64_t m, int64_t count, DType matrix, const PatchEmbedScratch& s) {
  constexpr int64_t lanes = NV * VL;
  const bool pairs = multiplies_pairs(matrix, a.patch * a.patch);
  const int64_t depth = a.patch * a.patch / (pairs ? 2 : 1), stride = gathered_stride(a) / (pairs ? 2 : 1);
  for (int64_t i = count * stride; i < lanes * stride; i++) s.gathered[i] = 0;
  for (int64_t channel = 0; channel < a.channels; channel++) {
    if (pairs)
      gather_channel(a, m, count, channel, reinterpret_cast<Bf16*>(s.gathered), 2 * stride, s.source);
    else
      gather_channel(a, m, count, channel, s.gathered, stride, s.source);
    float* to = s.panel + channel * depth * lanes;
    for (int64_t k = 0; k < depth; k += VL)
#pragma GCC unroll 16
      for (int v = 0; v < NV; v++) {
        Vec block[VL];
#pragma GCC unroll 16
        for (int r = 0; r < VL; r++) block[r] = load(s.gathered + (v * VL + r) * stride + k);
        transpose(block);
#pragma GCC unroll 16
        for (int r = 0; r < VL; r++) store(to + (k + r) * lanes + v * VL, block[r]);
      }
  }
  return {s.panel, lanes, pairs};
}

template <int NV>
inline void patch_embed_panel(const PatchEmbedArgs& a, int64_t m, int64_t count, int64_t begin, int64_t end,
                              const PatchEmbedScratch& s) {
  const int64_t depth = a.images.channels * a.images.patch * a.images.patch;
  const Panel panel = gather_panel<NV>(a.images, m, count, a.weight.dtype, s);
  const PanelRows out(a.out, m, count), positions(a.positions, m, count);
  for (int64_t e = begin; e < end; e += VL) {
    const int n = lanes_in(end - e);
    multiply_columns<NV>(a.weight, e, n, depth, panel, s.c, s.widened);
    const Vec bias = load(s.bias + e);
    for_each_row<NV>(s.c, panel.lanes, count,
                     [&](int64_t r, Vec y) { out.store(r, e, y + bias + positions.load(r, e, n), n); });
  }
  // The panel that holds an image's first patch writes the row before it.
  const int64_t per_image = a.images.per_image;
  for (int64_t image = ceil_div(m, per_image); image * per_image < m + count; image++) {
    const PanelRows to(a.cls_out, image, 1), cls(a.cls_token, 0, 1), position(a.cls_position, 0, 1);
    for (int64_t e = begin; e < end; e += VL) {
      const int n = lanes_in(end - e);
      to.store(0, e, cls.load(0, e, n) + position.load(0, e, n), n);
    }
  }
}

inline ProductPlan patch_embed_plan(const PatchEmbedArgs& a, int64_t threads) {
  return plan_product(a.patches, a.out_features, threads);
}

inline void patch_embed_run(const PatchEmbedArgs& a, const ProductPlan& plan, int64_t task,
                            const PatchEmbedScratch& s) {
  const PanelPiece piece(a.patches, a.out_features, plan, task);
  load_vector(a.bias, 0, a.out_features, 0.0f, s.bias);
  with_vectors(piece.vectors,
               [&]<int NV>() { patch_embed_panel<NV>(a, piece.m, piece.count, piece.begin, piece.end, s); });
}

// --- gradients -------------------------------------------------------------------------------------------------------

struct PatchRowsScratch : Scratch<PatchRowsArgs> {
  float* gathered = floats(gathered_stride(a.images) * VL);
  float* source = floats(source_floats(a.images));
};

inline Plan patch_rows_plan(const PatchRowsArgs& a, int64_t) { return {ceil_div(a.patches, VL)}; }
inline void patch_rows_run(const PatchRowsArgs& a, const Plan&, int64_t task, const PatchRowsScratch& s) {
  const int64_t m = task * VL, count = smaller(a.patches - m, VL);
  const int64_t pixels = a.images.patch * a.images.patch, stride = gathered_stride(a.images);
  for (int64_t channel = 0; channel < a.images.channels; channel++) {
    gather_channel(a.images, m, count, channel, s.gathered, stride, s.source);
    for (int64_t r = 0; r < count; r++) {
      float* to = a.rows + ((m + r) * a.images.channels + channel) * pixels;
      for (int64_t k = 0; k < pixels; k += VL) store_n(to + k, load(s.gathered + r * stride + k), lanes_in(pixels - k));
    }
  }
}

inline Plan patch_grad_images_plan(const ImagesGradArgs& a, int64_t) { return {a.batch * a.images.channels}; }
// One plane of one image: the patches' gradients put together and, where the images were resized, taken back.
inline void patch_grad_images_run(const ImagesGradArgs& a, const Plan&, int64_t task, const PlaneGradScratch& s) {
  const Images& images = a.images;
  const int64_t patch = images.patch, image = task / images.channels, channel = task % images.channels;
  const auto fill = [&](int64_t y, float* line) {
    const float* from =
        static_cast<const float*>(a.grad) +
        ((image * images.per_image + y / patch * images.per_row) * images.channels + channel) * patch * patch +
        y % patch * patch;
    for (int64_t p = 0; p < images.per_row; p++, from += images.channels * patch * patch)
      for (int64_t x = 0; x < patch; x += VL) store(line + p * patch + x, load_n(from + x, lanes_in(patch - x)));
  };
  const Rows out = plane_rows(images, image, channel);
  if (images.resize) return resize_plane_back(images, out, s, fill);
  for (int64_t y = 0; y < images.rows.in; y++) {
    fill(y, s.line);
    const PanelRows to(out, y, 1);
    for (int64_t x = 0; x < s.width; x += VL) to.store(0, x, load(s.line + x), lanes_in(s.width - x));
  }
}

}  // namespace crossvit::CROSSVIT_ISA
