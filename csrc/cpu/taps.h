// Images that are resized and cut into patches, and the taps of bicubic interpolation, as the kernels of resize.h and patch.h take them.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "launch.h"

namespace crossvit {

// The taps of torch.nn.functional.interpolate(mode="bicubic", align_corners=False), which takes A = -0.75, in float64.
struct AxisTaps {
  std::vector<int32_t> first;
  std::vector<float> weight[4];
  Taps taps{};

  AxisTaps(int64_t in, int64_t out, bool resize = true) {
    taps.in = in;
    taps.out = out;
    if (!resize) return;
    constexpr double A = -0.75;
    const auto inner = [](double x) { return ((A + 2) * x - (A + 3)) * x * x + 1; };        // |x| <= 1
    const auto outer = [](double x) { return ((A * x - 5 * A) * x + 8 * A) * x - 4 * A; };  // 1 < |x| < 2
    first.resize(out + kTapPadding);
    for (auto& w : weight) w.resize(out + kTapPadding);
    const double scale = static_cast<double>(in) / static_cast<double>(out);
    for (int64_t i = 0; i < out; i++) {
      const double source = scale * (static_cast<double>(i) + 0.5) - 0.5, below = std::floor(source);
      const double t = source - below;
      first[i] = static_cast<int32_t>(static_cast<int64_t>(below) - 1 + kBorder);
      const double weights[4] = {outer(1 + t), inner(t), inner(1 - t), outer(2 - t)};
      for (int k = 0; k < 4; k++) weight[k][i] = static_cast<float>(weights[k]);
    }
    std::fill(first.begin() + out, first.end(), first[out - 1]);
    taps.first = first.data();
    for (int k = 0; k < 4; k++) taps.weight[k] = weight[k].data();
  }
};

// Images, to be height x width, and their patches, if any; owns the taps, and a contiguous copy of images whose rows are not dense.
struct ResizedImages {
  Tensor tensor;
  AxisTaps rows, columns;
  Images images{};

  ResizedImages(Tensor t, int64_t height, int64_t width, int64_t patch = 0)
      : tensor(t.stride(3) == 1 || t.size(3) == 1 ? std::move(t) : t.contiguous()),
        rows(tensor.size(2), height, !patch || tensor.size(2) != height || tensor.size(3) != width),
        columns(tensor.size(3), width, rows.taps.first) {
    images = {tensor.data_ptr(), dtype_of(tensor), tensor.stride(0), tensor.stride(1),
              tensor.stride(2),  tensor.size(1),   rows.taps,        columns.taps};
    images.resize = rows.taps.first != nullptr;
    images.extent = 1;
    for (int64_t d = 0; d < 4; d++) images.extent += (tensor.size(d) - 1) * tensor.stride(d);
    if (!patch) return;
    images.patch = patch;
    images.per_row = width / patch;
    images.per_image = height / patch * images.per_row;
  }
  int64_t patches() const { return tensor.size(0) * images.per_image; }
};

}  // namespace crossvit
