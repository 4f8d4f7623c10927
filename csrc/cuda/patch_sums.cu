// What is left of patch_embed's gradients: sums over a batch, and the way back through a bicubic resize. Every sum is one
// thread's, or a fixed number of threads', always in the same order.
#include <cuda/ptx.cuh>

#include "cuda/launch.cuh"
#include "cuda/patch_embed.h"
#include "cuda/patch_gather.cuh"

namespace crossvit::cuda {

namespace {

constexpr int kLanes = 32, kGroups = 8;  // neighbouring elements; parts of the sum

// Four adjacent elements as they are added.
__device__ __forceinline__ void add_four(float (&sum)[4], const Vector& from, std::int64_t i) {
  if (from.type == Type::float32) {
    const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(from.data) + i);
    sum[0] += four.x, sum[1] += four.y, sum[2] += four.z, sum[3] += four.w;
    return;
  }
  const uint2 raw = *reinterpret_cast<const uint2*>(static_cast<const __half*>(from.data) + i);
  if (from.type == Type::float16) {
    __half four[4];
    memcpy(four, &raw, 8);
#pragma unroll
    for (int e = 0; e < 4; e++) sum[e] += to_float(four[e]);
  } else {
    __nv_bfloat16 four[4];
    memcpy(four, &raw, 8);
#pragma unroll
    for (int e = 0; e < 4; e++) sum[e] += to_float(four[e]);
  }
}

}  // namespace

// A block: kLanes times kVector elements, each the sum of kGroups threads' sums.
template <int kVector>
__global__ void __launch_bounds__(kLanes* kGroups) matrix_sum_kernel(const MatrixSumArgs args) {
  float* parts = reinterpret_cast<float*>(ptx::shared_memory());
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const std::int64_t total = args.rows * args.width;
  const std::int64_t element = (static_cast<std::int64_t>(blockIdx.x) * kLanes + lane) * kVector;
  float sum[kVector] = {};
  if (element < total) {
    const std::int64_t row = args.rows == 1 ? 0 : element / args.width;
    const std::int64_t at = row * args.row_stride + (element - row * args.width);
#pragma unroll 2
    for (std::int64_t i = group; i < args.count; i += kGroups) {
      if constexpr (kVector == 4) {
        add_four(sum, args.matrices, at + i * args.stride);
      } else {
        sum[0] += load(args.matrices.data, args.matrices.type, at + i * args.stride);
      }
    }
  }
#pragma unroll
  for (int e = 0; e < kVector; e++) parts[(group * kVector + e) * kLanes + lane] = sum[e];
  __syncthreads();
  if (group >= kVector) return;
  // Neighbouring threads store neighbouring elements.
  const int index = static_cast<int>(threadIdx.x), from = index % kVector * kLanes + index / kVector;
  const std::int64_t to = static_cast<std::int64_t>(blockIdx.x) * kLanes * kVector + index;
  if (to >= total) return;
  float result = 0;
#pragma unroll
  for (int g = 0; g < kGroups; g++) result += parts[g * kVector * kLanes + from];
  if (args.all != nullptr) store(args.all, args.all_type, to, result);
  if (args.first != nullptr && to < args.first_size) store(args.first, args.first_type, to, result);
  if (args.sums != nullptr) args.sums[to] = result;
}

// Each pixel gathers from the resized pixels whose taps meet it.
__global__ void __launch_bounds__(256) resize_gradient_kernel(const ResizeGradientArgs args, const float scale,
                                                              const float inverse_scale, const int candidates) {
  const std::int64_t element = static_cast<std::int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (element >= args.outer * args.size * args.inner) return;
  const std::int64_t line = element / args.inner, outer = line / args.size;
  const int at = static_cast<int>(line - outer * args.size);
  const float* grad = args.grad + outer * args.resized * args.inner + (element - line * args.inner);
  // Taps reach two pixels to either side; beyond a border they reach the border's pixel, which is no farther.
  const int first = static_cast<int>(floorf((static_cast<float>(at) - 1.5f) * inverse_scale - 0.5f)) - 1;
  float sum = 0;
  for (int candidate = max(first, 0); candidate < min(first + candidates, args.resized); candidate++) {
    const Taps taps = cubic_taps(candidate, scale);
    float weight = 0;
    bool meets = false;
#pragma unroll
    for (int t = 0; t < 4; t++) {
      const bool same = clamp(taps.first + t, args.size) == at;
      weight += same ? taps.weight[t] : 0.0f;
      meets = meets || same;
    }
    if (meets) sum = fmaf(grad[static_cast<std::int64_t>(candidate) * args.inner], weight, sum);
  }
  store(args.out, args.out_type, element, sum);
}

Error launch_matrix_sum(const MatrixSumArgs& args, Stream stream) {
  const int vector = args.aligned ? 4 : 1;
  const std::int64_t per_block = kLanes * vector;
  const dim3 grid(static_cast<unsigned>((args.rows * args.width + per_block - 1) / per_block));
  const int threads = kLanes * kGroups, shared = threads * vector * 4;
  if (args.aligned) return launch(matrix_sum_kernel<4>, grid, threads, shared, stream, args);
  return launch(matrix_sum_kernel<1>, grid, threads, shared, stream, args);
}

Error launch_resize_gradient(const ResizeGradientArgs& args, Stream stream) {
  const double scale = static_cast<double>(args.size) / args.resized;
  const std::int64_t total = args.outer * args.size * args.inner;
  // As many resized pixels as four of the images' cover, and those that rounding may add.
  const int candidates = static_cast<int>(4 / scale) + 5;
  return launch(resize_gradient_kernel, dim3(static_cast<unsigned>((total + 255) / 256)), 256, 0, stream, args,
                static_cast<float>(scale), static_cast<float>(1 / scale), candidates);
}

}  // namespace crossvit::cuda
