// Bicubic interpolation of planes, and its gradient: first along the rows' axis (four source rows, whole vectors) into a
// line of floats, then along the columns', where a result finds its taps by a permutation of two vectors of that line.
#pragma once

#include "rows.h"
#include "tasks.h"

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
inline int64_t source_pitch(const Images& a) { return round_up(a.columns.in + 4, VL) + 2 * VL; }

// Row y of the resized plane before its columns are: pixel x in line[kBorder + x], for what taps from line[begin] up to
// line[end] read.
template <class Pixel>
inline void resize_vertically(const Images& a, const Pixel* plane, int64_t y, int64_t begin, int64_t end, float* line) {
  const int64_t width = a.columns.in, left = larger(begin - kBorder, 0), right = smaller(end - kBorder, width);
  const Pixel* from[4];
  float weight[4];
  for (int t = 0; t < 4; t++) {
    const int64_t at = a.rows.first[y] + t - kBorder;
    from[t] = plane + smaller(larger(at, 0), a.rows.in - 1) * a.row_stride;
    weight[t] = a.rows.weight[t][y];
  }
  if (right - left >= VL) {
    for (int64_t x = left; x < right; x += VL) {
      const int64_t at = smaller(x, right - VL);
      Vec v = load(from[0] + at) * weight[0];
#pragma GCC unroll 16
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

// The taps of the results x to x + VL - 1 of a row, for any number of lines.
struct ColumnTaps {
  int32_t base;
  IVec index;
  Vec weight[4];
  CROSSVIT_INLINE ColumnTaps(const Taps& taps, int64_t x) : base(taps.first[x]), index(load(taps.first + x) - base) {
#pragma GCC unroll 16
    for (int t = 0; t < 4; t++) weight[t] = load(taps.weight[t] + x);
  }
  template <bool near>
  CROSSVIT_INLINE Vec apply(const float* line) const {
    line += base;
    Vec v = lookup<near>(line, index) * weight[0];
#pragma GCC unroll 16
    for (int t = 1; t < 4; t++) v += lookup<near>(line, index + t) * weight[t];
    return v;
  }
};

inline Rows plane_rows(const Images& a, int64_t image, int64_t channel) {
  return {static_cast<char*>(a.data) + (image * a.batch_stride + channel * a.channel_stride) * size_of(a.dtype),
          a.dtype, a.rows.in, 0, a.row_stride};
}

// --- bicubic_resize --------------------------------------------------------------------------------------------------

constexpr int64_t kResizeRows = 4;   // at a time, which share their columns' taps
constexpr int64_t kResizeBand = 32;  // of a task

inline int64_t resize_bands(const ResizeArgs& a) { return ceil_div(a.images.rows.out, kResizeBand); }
inline Plan resize_plan(const ResizeArgs& a, int64_t) { return {a.batch * a.images.channels * resize_bands(a)}; }
struct ResizeScratch : Scratch<ResizeArgs> {
  float* source = floats(kResizeRows * source_pitch(a.images));
};

// Rows [y, y + count) of a resized plane.
template <bool near, class Pixel>
inline void resize_rows(const Images& a, const Pixel* plane, int64_t y, int64_t count, Pixel* out, float* source) {
  const int64_t width = a.columns.out, pitch = source_pitch(a);
  const int64_t begin = a.columns.first[0], end = a.columns.first[width - 1] + 4;
  for (int64_t r = 0; r < count; r++) resize_vertically(a, plane, y + r, begin, end, source + r * pitch);
  for (int64_t i = 0; i < width; i += VL) {
    const int64_t x = vector_start(i, width);
    const ColumnTaps taps(a.columns, x);
    for (int64_t r = 0; r < count; r++) {
      const Vec v = taps.apply<near>(source + r * pitch);
      Pixel* to = out + (y + r) * width + x;
      width >= VL ? store(to, v) : store_n(to, v, static_cast<int>(width));
    }
  }
}

template <class Pixel>
inline void resize_band(const ResizeArgs& a, int64_t task, float* source) {
  const int64_t plane = task / resize_bands(a), first = task % resize_bands(a) * kResizeBand;
  const int64_t last = smaller(first + kResizeBand, a.images.rows.out);
  const bool near = taps_are_near(a.images.columns);
  const auto* from =
      static_cast<const Pixel*>(plane_rows(a.images, plane / a.images.channels, plane % a.images.channels).data);
  Pixel* out = static_cast<Pixel*>(a.out) + plane * a.images.rows.out * a.images.columns.out;
  for (int64_t y = first; y < last; y += kResizeRows) {
    const int64_t count = smaller(last - y, kResizeRows);
    if (near)
      resize_rows<true>(a.images, from, y, count, out, source);
    else
      resize_rows<false>(a.images, from, y, count, out, source);
  }
}

inline void resize_run(const ResizeArgs& a, const Plan&, int64_t task, const ResizeScratch& s) {
  if (a.images.dtype == DType::float32)
    resize_band<float>(a, task, s.source);
  else
    resize_band<Bf16>(a, task, s.source);
}

// --- gradients -------------------------------------------------------------------------------------------------------

struct PlaneGradScratch : Scratch<ImagesGradArgs> {
  const Images& images = a.images;
  int64_t width = images.columns.out;        // of the resized plane
  int64_t pitch = round_up(width, VL) + VL;  // floats between its rows
  float* line = floats(pitch);
  float* plane = floats(images.resize ? (images.rows.in + 2 * kBorder) * pitch : 0);
  float* before = floats(images.resize ? pitch * VL : 0);
  float* after = floats(images.resize ? (round_up(images.columns.in, VL) + 2 * kBorder) * VL : 0);
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

// The gradient of one plane from that of the resized one, whose row y fill(y, line) writes: through the rows' taps and
// then the columns', always in the same order.
template <class Fill>
inline void resize_plane_back(const Images& a, const Rows& out, const PlaneGradScratch& s, Fill fill) {
  for (int64_t i = 0; i < (a.rows.in + 2 * kBorder) * s.pitch; i += VL) store(s.plane + i, Vec{});
  for (int64_t y = 0; y < a.rows.out; y++) {
    fill(y, s.line);
    for (int t = 0; t < 4; t++) {
      float* to = s.plane + (a.rows.first[y] + t) * s.pitch;
      const float weight = a.rows.weight[t][y];
      for (int64_t x = 0; x < s.width; x += VL) store(to + x, load(to + x) + load(s.line + x) * weight);
    }
  }
  fold_border(s.plane, a.rows.in, s.pitch);
  // The columns of VL rows at a time, the rows as lanes.
  const Rows plane{s.plane + kBorder * s.pitch, DType::float32, a.rows.in, 0, s.pitch};
  for (int64_t m = 0; m < a.rows.in; m += VL) {
    const int64_t count = smaller(a.rows.in - m, VL);
    load_transposed(plane, m, count, 0, s.width, s.before, VL);
    for (int64_t x = 0; x < (a.columns.in + 2 * kBorder) * VL; x += VL) store(s.after + x, Vec{});
    for (int64_t x = 0; x < s.width; x++) {
      const Vec g = load(s.before + x * VL);
      float* to = s.after + a.columns.first[x] * VL;
#pragma GCC unroll 16
      for (int t = 0; t < 4; t++) store(to + t * VL, load(to + t * VL) + g * a.columns.weight[t][x]);
    }
    fold_border(s.after, a.columns.in, VL);
    const PanelRows to(out, m, count);
    for (int64_t x = 0; x < a.columns.in; x += VL) {
      const int n = lanes_in(a.columns.in - x);
      for_each_row<1>(s.after + (kBorder + x) * VL, VL, count, [&](int64_t r, Vec g) { to.store(r, x, g, n); });
    }
  }
}

inline Plan resize_grad_plan(const ImagesGradArgs& a, int64_t) { return {a.batch * a.images.channels}; }
inline void resize_grad_run(const ImagesGradArgs& a, const Plan&, int64_t task, const PlaneGradScratch& s) {
  const Rows grad{const_cast<void*>(a.grad), a.images.dtype, 1, s.width, 0};
  resize_plane_back(a.images, plane_rows(a.images, task / a.images.channels, task % a.images.channels), s,
                    [&](int64_t y, float* line) {
                      const PanelRows from(grad, task * a.images.rows.out + y, 1);
                      for (int64_t x = 0; x < s.width; x += VL) store(line + x, from.load(0, x, lanes_in(s.width - x)));
                    });
}

}  // namespace crossvit::CROSSVIT_ISA
