// patch_embed on one panel of patches: resized, cut out and turned into the panel in scratch, multiplied, and stored
// with their positions; and the way back to the weight's and the images' gradients. A pixel of the resized images is
// made by the panel that uses it: first along the rows' axis (four source rows, whole vectors), then the columns'.
#pragma once

#include "linear.h"

namespace crossvit::CROSSVIT_ISA {

CROSSVIT_INLINE IVec load(const int32_t* p) {
  IVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// p[index[l]] in lane l; near: no index reaches 2 VL, and 2 VL floats may be read.
template <bool near>
CROSSVIT_INLINE Vec lookup(const float* p, IVec index) {
#if defined(__AVX512F__)
  if constexpr (near) return (Vec)_mm512_permutex2var_ps((__m512)load(p), (__m512i)index, (__m512)load(p + VL));
#elif defined(__AVX2__)
  if constexpr (near) {
    const Vec low = (Vec)_mm256_permutevar8x32_ps((__m256)load(p), (__m256i)index);
    const Vec high = (Vec)_mm256_permutevar8x32_ps((__m256)load(p + VL), (__m256i)index);
    return index < VL ? low : high;
  }
#endif
  Vec v;
  for (int l = 0; l < VL; l++) v[l] = p[index[l]];
  return v;
}

// Whether VL neighbouring results find all their taps within 2 VL pixels.
inline bool taps_are_near(const Taps& taps) { return ceil_div((VL - 1) * taps.in, taps.out) + 4 <= 2 * VL; }

// The vectors of a row of `length` values start at 0, VL, ... and the last one, where it would overshoot, VL before the
// end. A row shorter than a vector overshoots: rows are written in order, so that the next one puts it right.
CROSSVIT_INLINE int64_t vector_start(int64_t i, int64_t length) { return smaller(i, larger(length - VL, 0)); }

// Floats between the rows of the vertically resized source: its width, a border on both sides, what lookup() reads.
inline int64_t source_pitch(const PatchImages& a) { return round_up(a.columns.in + 4, VL) + 2 * VL; }

// Patches [column, column + patches) of row of patches `row` of one channel, resized: to[p * stride + py * patch + px].
template <bool near, class Pixel, class Element>
inline void resize_patches(const PatchImages& a, const Pixel* plane, int64_t row, int64_t column, int64_t patches,
                           Element* to, int64_t stride, float* source) {
  const int64_t width = a.columns.in, pitch = source_pitch(a);
  const int64_t begin = a.columns.first[column * a.patch], end = a.columns.first[(column + patches) * a.patch - 1] + 4;
  const int64_t left = larger(begin - kBorder, 0), right = smaller(end - kBorder, width);
  for (int64_t py = 0; py < a.patch; py++) {
    const int64_t y = row * a.patch + py;
    const Pixel* from[4];
    float weight[4];
    for (int t = 0; t < 4; t++) {
      const int64_t at = a.rows.first[y] + t - kBorder;
      from[t] = plane + smaller(larger(at, 0), a.rows.in - 1) * a.row_stride;
      weight[t] = a.rows.weight[t][y];
    }
    float* line = source + py * pitch;
    if (right - left >= VL) {
      for (int64_t x = left; x < right; x += VL) {
        const int64_t at = smaller(x, right - VL);
        Vec v = load(from[0] + at) * weight[0];
  CROSSVIT_UNROLL
        for (int t = 1; t < 4; t++) v += load(from[t] + at) * weight[t];
        store(line + kBorder + at, v);
      }
    } else {
      const int n = static_cast<int>(right - left);
      Vec v = load_n(from[0] + left, n) * weight[0];
      for (int t = 1; t < 4; t++) v += load_n(from[t] + left, n) * weight[t];
      store_n(line + kBorder + left, v, n);
    }
    for (int64_t x = begin; x < kBorder; x++) line[x] = line[kBorder];
    for (int64_t x = width + kBorder; x < end; x++) line[x] = line[width + kBorder - 1];
  }
  for (int64_t p = 0; p < patches; p++)
    for (int64_t i = 0; i < a.patch; i += VL) {
      const int64_t px = vector_start(i, a.patch), x = (column + p) * a.patch + px;
      const int32_t base = a.columns.first[x];
      const IVec index = load(a.columns.first + x) - base;
      Vec weight[4];
      CROSSVIT_UNROLL
      for (int t = 0; t < 4; t++) weight[t] = load(a.columns.weight[t] + x);
      for (int64_t py = 0; py < a.patch; py++) {
        const float* line = source + py * pitch + base;
        Vec v = lookup<near>(line, index) * weight[0];
        CROSSVIT_UNROLL
        for (int t = 1; t < 4; t++) v += lookup<near>(line, index + t) * weight[t];
        store(to + p * stride + py * a.patch + px, v);
      }
    }
}

// The same where the images have their size already. Rows shorter than a vector are read with what lies behind them, as
// long as that is still the images' memory.
template <class Pixel, class Element>
inline void copy_patches(const PatchImages& a, const Pixel* plane, int64_t row, int64_t column, int64_t patches,
                         Element* to, int64_t stride) {
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
inline void gather_channel_as(const PatchImages& a, int64_t m, int64_t count, int64_t channel, Element* to,
                              int64_t stride, float* source) {
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
inline void gather_channel(const PatchImages& a, int64_t m, int64_t count, int64_t channel, Element* to, int64_t stride,
                           float* source) {
  if (a.dtype == DType::f32)
    gather_channel_as<float>(a, m, count, channel, to, stride, source);
  else
    gather_channel_as<uint16_t>(a, m, count, channel, to, stride, source);
}

// Elements from one gathered patch to the next.
inline int64_t gathered_stride(const PatchImages& a) { return round_up(a.patch * a.patch, VL) + VL; }
inline int64_t source_floats(const PatchImages& a) { return a.resize ? a.patch * source_pitch(a) : 0; }

struct PatchEmbedScratch {
  float *panel, *gathered, *source, *c, *widened, *bias;
  int64_t bytes;
  PatchEmbedScratch(const PatchEmbedArgs& a, char* base) {
    Arena arena{base};
    constexpr int64_t lanes = kPanelVectors * VL;
    const int64_t depth = a.images.channels * a.images.patch * a.images.patch;
    panel = arena.floats((depth + VL) * lanes);  // a channel's last block may overshoot
    gathered = arena.floats(gathered_stride(a.images) * lanes);
    source = arena.floats(source_floats(a.images));
    c = arena.floats(VL * lanes);
    widened = arena.floats(kBlock * depth);
    bias = arena.floats(a.out_features + VL);
    bytes = arena.used;
  }
};

// Patches [m, m + count) as a panel ready to be multiplied. Pairs are made while the pixels of a patch still lie side
// by side, so that half as much is transposed.
template <int NV>
inline Panel gather_panel(const PatchImages& a, int64_t m, int64_t count, DType matrix, const PatchEmbedScratch& s) {
  constexpr int64_t lanes = NV * VL;
  const bool pairs = multiplies_pairs(matrix, a.patch * a.patch);
  const int64_t depth = a.patch * a.patch / (pairs ? 2 : 1), stride = gathered_stride(a) / (pairs ? 2 : 1);
  for (int64_t i = count * stride; i < lanes * stride; i++) s.gathered[i] = 0;
  for (int64_t channel = 0; channel < a.channels; channel++) {
    if (pairs)
      gather_channel(a, m, count, channel, reinterpret_cast<uint16_t*>(s.gathered), 2 * stride, s.source);
    else
      gather_channel(a, m, count, channel, s.gathered, stride, s.source);
    float* to = s.panel + channel * depth * lanes;
    for (int64_t k = 0; k < depth; k += VL)
      CROSSVIT_UNROLL
      for (int v = 0; v < NV; v++) {
        Vec block[VL];
        CROSSVIT_UNROLL
        for (int r = 0; r < VL; r++) block[r] = load(s.gathered + (v * VL + r) * stride + k);
        transpose(block);
        CROSSVIT_UNROLL
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
    const int n = static_cast<int>(smaller(end - e, VL));
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
      const int n = static_cast<int>(smaller(end - e, VL));
      to.store(0, e, cls.load(0, e, n) + position.load(0, e, n), n);
    }
  }
}

inline int64_t patch_embed_tasks(PatchEmbedArgs& a, int64_t threads) {
  return choose_pieces(a.patches, a.out_features, threads, a.pieces);
}

inline int64_t patch_embed_scratch(const PatchEmbedArgs& a) { return PatchEmbedScratch(a, nullptr).bytes; }

inline void patch_embed_run(const PatchEmbedArgs& a, int64_t task, char* scratch) {
  const PatchEmbedScratch s(a, scratch);
  const PanelPiece piece(a.patches, a.out_features, a.pieces, task);
  load_vector(a.bias, 0, a.out_features, 0.0f, s.bias);
  with_vectors(piece.vectors,
               [&]<int NV>() { patch_embed_panel<NV>(a, piece.m, piece.count, piece.begin, piece.end, s); });
}

// --- gradients -------------------------------------------------------------------------------------------------------

struct PatchRowsScratch {
  float *gathered, *source;
  int64_t bytes;
  PatchRowsScratch(const PatchRowsArgs& a, char* base) {
    Arena arena{base};
    gathered = arena.floats(gathered_stride(a.images) * VL);
    source = arena.floats(source_floats(a.images));
    bytes = arena.used;
  }
};

inline int64_t patch_rows_tasks(PatchRowsArgs& a, int64_t) { return ceil_div(a.patches, VL); }
inline int64_t patch_rows_scratch(const PatchRowsArgs& a) { return PatchRowsScratch(a, nullptr).bytes; }
inline void patch_rows_run(const PatchRowsArgs& a, int64_t task, char* scratch) {
  const PatchRowsScratch s(a, scratch);
  const int64_t m = task * VL, count = smaller(a.patches - m, VL);
  const int64_t pixels = a.images.patch * a.images.patch, stride = gathered_stride(a.images);
  for (int64_t channel = 0; channel < a.images.channels; channel++) {
    gather_channel(a.images, m, count, channel, s.gathered, stride, s.source);
    for (int64_t r = 0; r < count; r++) {
      float* to = a.rows + ((m + r) * a.images.channels + channel) * pixels;
      for (int64_t k = 0; k < pixels; k += VL)
        store_n(to + k, load(s.gathered + r * stride + k), static_cast<int>(smaller(pixels - k, VL)));
    }
  }
}

struct PatchGradImagesScratch {
  float *line, *plane, *before, *after;
  int64_t width, pitch, bytes;  // of the resized plane; floats between its rows
  PatchGradImagesScratch(const PatchGradImagesArgs& a, char* base) {
    Arena arena{base};
    const PatchImages& images = a.images;
    width = images.per_row * images.patch;
    pitch = round_up(width, VL) + VL;
    line = arena.floats(pitch);
    plane = arena.floats(images.resize ? (images.rows.in + 2 * kBorder) * pitch : 0);
    before = arena.floats(images.resize ? pitch * VL : 0);
    after = arena.floats(images.resize ? (round_up(images.columns.in, VL) + 2 * kBorder) * VL : 0);
    bytes = arena.used;
  }
};

// The border repeats the outermost of `count` lines: what was added to it belongs to them. Lines of `length` floats.
inline void fold_border(float* lines, int64_t count, int64_t length) {
  float* first = lines + kBorder * length;
  float* last = first + (count - 1) * length;
  for (int64_t i = 1; i <= kBorder; i++)
    for (int64_t x = 0; x < length; x += VL) {
      store(first + x, load(first + x) + load(first - i * length + x));
      store(last + x, load(last + x) + load(last + i * length + x));
    }
}

inline int64_t patch_grad_images_tasks(PatchGradImagesArgs& a, int64_t) { return a.batch * a.images.channels; }
inline int64_t patch_grad_images_scratch(const PatchGradImagesArgs& a) {
  return PatchGradImagesScratch(a, nullptr).bytes;
}

// One plane of one image: the patches' gradients put together and, where the images were resized, taken back through
// the rows' taps and then the columns', always in the same order.
inline void patch_grad_images_run(const PatchGradImagesArgs& a, int64_t task, char* scratch) {
  const PatchGradImagesScratch s(a, scratch);
  const PatchImages& images = a.images;
  const int64_t patch = images.patch, image = task / images.channels, channel = task % images.channels;
  const Rows out{static_cast<char*>(images.data) +
                     (image * images.batch_stride + channel * images.channel_stride) * size_of(images.dtype),
                 images.dtype, images.rows.in, 0, images.row_stride};
  if (images.resize)
    for (int64_t i = 0; i < (images.rows.in + 2 * kBorder) * s.pitch; i += VL) store(s.plane + i, Vec{});
  for (int64_t y = 0; y < images.per_image / images.per_row * patch; y++) {
    const float* from = a.rows + ((image * images.per_image + y / patch * images.per_row) * images.channels + channel) *
                                     patch * patch + y % patch * patch;
    for (int64_t p = 0; p < images.per_row; p++, from += images.channels * patch * patch)
      for (int64_t x = 0; x < patch; x += VL)
        store(s.line + p * patch + x, load_n(from + x, static_cast<int>(smaller(patch - x, VL))));
    if (!images.resize) {
      const PanelRows to(out, y, 1);
      for (int64_t x = 0; x < s.width; x += VL)
        to.store(0, x, load(s.line + x), static_cast<int>(smaller(s.width - x, VL)));
      continue;
    }
    for (int t = 0; t < 4; t++) {
      float* to = s.plane + (images.rows.first[y] + t) * s.pitch;
      const float weight = images.rows.weight[t][y];
      for (int64_t x = 0; x < s.width; x += VL) store(to + x, load(to + x) + load(s.line + x) * weight);
    }
  }
  if (!images.resize) return;
  fold_border(s.plane, images.rows.in, s.pitch);
  // The columns of VL rows at a time, the rows as lanes.
  const Rows plane{s.plane + kBorder * s.pitch, DType::f32, images.rows.in, 0, s.pitch};
  for (int64_t m = 0; m < images.rows.in; m += VL) {
    const int64_t count = smaller(images.rows.in - m, VL);
    load_transposed(plane, m, count, 0, s.width, s.before, VL);
    for (int64_t x = 0; x < (images.columns.in + 2 * kBorder) * VL; x += VL) store(s.after + x, Vec{});
    for (int64_t x = 0; x < s.width; x++) {
      const Vec g = load(s.before + x * VL);
      float* to = s.after + images.columns.first[x] * VL;
      CROSSVIT_UNROLL
      for (int t = 0; t < 4; t++) store(to + t * VL, load(to + t * VL) + g * images.columns.weight[t][x]);
    }
    fold_border(s.after, images.columns.in, VL);
    const PanelRows to(out, m, count);
    for (int64_t x = 0; x < images.columns.in; x += VL) {
      const int n = static_cast<int>(smaller(images.columns.in - x, VL));
      for_each_row<1>(s.after + (kBorder + x) * VL, VL, count, [&](int64_t r, Vec g) { to.store(r, x, g, n); });
    }
  }
}

}  // namespace crossvit::CROSSVIT_ISA
