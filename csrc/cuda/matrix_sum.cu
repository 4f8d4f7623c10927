// Sums of matrices: of a batch, and of the parts that blocks left. Every sum is of a fixed number of threads' sums, always
// in the same order.
#include "cuda/matrix_sum.h"

#include <cuda/ptx.cuh>

#include "cuda/launch.cuh"
#include "cuda/types.cuh"

namespace crossvit::cuda {

namespace {

constexpr int kLanes = 32, kSumParts = 8;  // neighbouring elements; parts of the sum

// Four adjacent elements as they are added.
__device__ __forceinline__ void add_four(float (&sum)[4], const Vector& from, std::int64_t i) {
  if (from.dtype == DType::float32) {
    const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(from.data) + i);
    sum[0] += four.x, sum[1] += four.y, sum[2] += four.z, sum[3] += four.w;
    return;
  }
  const uint2 raw = *reinterpret_cast<const uint2*>(static_cast<const __half*>(from.data) + i);
  if (from.dtype == DType::float16) {
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

// A block: kLanes times kVector elements, each the sum of kSumParts threads' sums.
template <int kVector>
__global__ void __launch_bounds__(kLanes* kSumParts) matrix_sum_kernel(const MatrixSumArgs args) {
  float* parts = reinterpret_cast<float*>(ptx::shared_memory());
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const std::int64_t total = args.rows * args.width;
  const std::int64_t element = (static_cast<std::int64_t>(blockIdx.x) * kLanes + lane) * kVector;
  float sum[kVector] = {};
  if (element < total) {
    const std::int64_t row = args.rows == 1 ? 0 : element / args.width;
    const std::int64_t at = row * args.row_stride + (element - row * args.width);
#pragma unroll 2
    for (std::int64_t i = group; i < args.count; i += kSumParts) {
      if constexpr (kVector == 4) {
        add_four(sum, args.matrices, at + i * args.stride);
      } else {
        sum[0] += load(args.matrices, at + i * args.stride);
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
  for (int g = 0; g < kSumParts; g++) result += parts[g * kVector * kLanes + from];
  if (args.all.data) store(args.all, to, result);
  if (to < args.first_size) {
    if (args.first.data) store(args.first, to, result);
  } else if (args.second.data) {
    store(args.second, to - args.first_size, result);
  }
  if (args.sums != nullptr) args.sums[to] = result;
}

Error matrix_sum(const MatrixSumArgs& args, Stream stream) {
  constexpr int kThreads = kLanes * kSumParts;
  const std::int64_t total = args.rows * args.width;
  if (args.aligned)
    return launch(matrix_sum_kernel<4>, divide_up(total, 4 * kLanes), kThreads, kThreads * 4 * 4, stream, args);
  return launch(matrix_sum_kernel<1>, divide_up(total, kLanes), kThreads, kThreads * 4, stream, args);
}

}  // namespace crossvit::cuda
