// The taps of bicubic interpolation, as the kernels of resize.h take them.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"

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

}  // namespace crossvit
