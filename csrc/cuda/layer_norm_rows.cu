// act(LayerNorm(x)) to memory, for products that are not fused with it: eight lanes to a row.
#include <algorithm>
#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/layer_norm_linear.h"
#include "cuda/math.cuh"
#include "cuda/norm.cuh"
#include "cuda/quad.cuh"

namespace crossvit::cuda {

namespace {

constexpr int kNormThreads = 128, kNormRows = kNormThreads / kLanesPerRow;

// y = act(LayerNorm(x)) to memory, for products that are not fused. X is x's type.
template <class T, class X>
__global__ void __launch_bounds__(kNormThreads) norm_rows_kernel(const LayerNormLinearArgs p, bool given, bool staged) {
  float* affine = reinterpret_cast<float*>(ptx::shared_memory());
  if (staged) load_affine(affine, p.width, p.norm.weight, p.norm.bias);
  __syncthreads();
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kNormRows + threadIdx.x / kLanesPerRow;
  const X* from = row_of<const X>(p.x, min(row, p.rows - 1));
  const auto read = [&](int column, float (&v)[4]) {
    const Quad quad = to_quad(load_four(from, column, p.width, p.x.aligned));
#pragma unroll
    for (int e = 0; e < 4; e++) v[e] = quad.at[e];
  };
  RowStatistics statistics;
  if (given) {
    statistics = {p.mean[min(row, p.rows - 1)], 0.0f, p.rstd[min(row, p.rows - 1)]};
  } else {
    statistics = row_statistics<4>(p.width, p.norm.eps, to_float(from[0]), read);
  }
  if (row >= p.rows) return;
  const int lane = threadIdx.x % kLanesPerRow;
  if (p.mean && !given && lane == 0) {
    p.mean[row] = statistics.origin + statistics.shift;
    p.rstd[row] = statistics.rstd;
  }
#pragma unroll 4
  for (int column = lane * 4; column < p.width; column += kLanesPerRow * 4) {
    Quad v;
    read(column, v.at);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int c = min(column + e, p.width - 1);
      const Vector &weight = p.norm.weight, &bias = p.norm.bias;
      const float factor = staged ? affine[c] : load(weight, c);
      const float offset = staged ? affine[p.width + c] : load_or_zero(bias, c);
      v.at[e] = fmaf((v.at[e] - statistics.origin - statistics.shift) * statistics.rstd, factor, offset);
      if (p.gelu_in) v.at[e] = gelu<T>(v.at[e]);
    }
    store_four(row_of<T>(p.normalized, row), column, p.width, p.normalized.aligned, v);
  }
}

template <class T>
Error launch_norm_rows(const LayerNormLinearArgs& args, bool given, Stream stream) {
  const std::int64_t grid = divide_up(args.rows, kNormRows);
  const std::size_t affine = 2 * sizeof(float) * args.width;
  const bool staged = affine <= 48 * 1024;
  const std::size_t shared = staged ? affine : 0;
  if (args.x.dtype == args.dtype)
    return launch(norm_rows_kernel<T, T>, grid, kNormThreads, shared, stream, args, given, staged);
  return launch(norm_rows_kernel<T, float>, grid, kNormThreads, shared, stream, args, given, staged);
}

}  // namespace

Error layer_norm_rows(const LayerNormLinearArgs& args, bool given, Stream stream) {
  return with_type(args.dtype, [&](auto example) { return launch_norm_rows<decltype(example)>(args, given, stream); });
}

}  // namespace crossvit::cuda
