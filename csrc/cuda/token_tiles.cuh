// The tokens of an image as the passes over them take them: steps of 16 tokens, each normalised in shared memory and met
// there by all heads. A step belongs to a warp group of `parts` warps, which split its columns among them; warp groups
// go their own ways, each with a ring of buffers that asynchronous copies fill. Token 0 is CLS.
#pragma once

#include <cuda/ptx.cuh>

#include <cstdint>
#include <initializer_list>

#include "cuda/cls_cross_attention.h"
#include "cuda/types.cuh"

namespace crossvit::cuda {

// A part of a block's shared memory, in bytes. What is made with behind() begins where this one ends.
struct Region {
  int begin = 0, size = 0;
  __host__ __device__ constexpr int end() const { return begin + size; }
  __host__ __device__ constexpr Region behind(int bytes) const { return {end(), bytes}; }
  template <class T>
  __device__ __forceinline__ T* in(unsigned char* memory) const {
    return reinterpret_cast<T*>(memory + begin);
  }
};
// Whether these lie one behind the other and all begin at multiples of 16 bytes.
template <class... Regions>
constexpr bool in_order(const Region& first, const Regions&... others) {
  int end = first.begin;
  bool right = true;
  for (const Region& region : {first, others...}) {
    right = right && region.begin >= end && region.begin % 16 == 0 && region.size >= 0;
    end = region.end();
  }
  return right;
}

constexpr int kTokenWarps = 8, kTokenThreads = 32 * kTokenWarps;
constexpr int kStepTokens = 16;

// Blocks on a multiprocessor for which registers are kept within bounds: before Hopper its shared memory holds one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kTokenBlocks = 1;
#else
constexpr int kTokenBlocks = 2;
#endif

// Tiles of 16 columns whose sums a warp keeps, for one head group (8 heads).
constexpr int kMostTiles = 12;
template <int kHeadGroups>
constexpr int kTiles = kMostTiles / kHeadGroups;

// Elements of a row in shared memory, an odd number of 16 bytes; `columns` is a multiple of 16.
__host__ __device__ constexpr int row_stride(int columns, int element) {
  return (columns * element / 16 | 1) * 16 / element;
}

// LayerNorm's x^ = (x - mean) rstd of a row of X in shared memory, in place, as T, followed by zeros up to `columns`. A row
// belongs to `lanes` adjacent lanes, of which this is lane `sub`; all lanes of the warp call it, with rows of their own.
// kSaved: mean and rstd are given, else computed by two passes over x - x[0]. A row that is not `valid` becomes zero.
template <class T, class X, bool kSaved>
__device__ __forceinline__ void normalize_row(unsigned char* row, bool valid, int sub, int lanes, int width,
                                              int columns, float eps, float& mean, float& rstd) {
  constexpr int kChunk = Chunk<X>::kSize, kHeld = 24 / kChunk;
  const X* from = reinterpret_cast<const X*>(row);
  T* to = reinterpret_cast<T*>(row);
  const float origin = kSaved ? mean : to_float(from[0]);
  const auto sum_lanes = [lanes](float value) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
    return value;
  };
  float shift = 0;  // the mean of x - x[0]
  if (width % kChunk == 0 && width <= kHeld * kChunk * lanes) {
    const int chunks = width / kChunk;
    float x[kHeld][kChunk];
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kHeld; j++) {
      if (sub + j * lanes < chunks) {
        const Chunk<X> chunk = reinterpret_cast<const Chunk<X>*>(row)[sub + j * lanes];
#pragma unroll
        for (int e = 0; e < kChunk; e++) sum += x[j][e] = to_float(chunk.at[e]) - origin;
      } else {
#pragma unroll
        for (int e = 0; e < kChunk; e++) x[j][e] = 0;
      }
    }
    if constexpr (!kSaved) {
      shift = sum_lanes(sum) / width;
      float squares = 0;
#pragma unroll
      for (int j = 0; j < kHeld; j++) {
        if (sub + j * lanes < chunks) {
#pragma unroll
          for (int e = 0; e < kChunk; e++) x[j][e] -= shift, squares = fmaf(x[j][e], x[j][e], squares);
        }
      }
      rstd = rsqrtf(sum_lanes(squares) / width + eps);
      mean = origin + shift;
    }
    if constexpr (sizeof(T) != sizeof(X)) __syncwarp();  // what is written now, other lanes have read
#pragma unroll
    for (int j = 0; j < kHeld; j++) {
      const int c = (sub + j * lanes) * kChunk;
      if (c >= columns) continue;
      float y[kChunk];
#pragma unroll
      for (int e = 0; e < kChunk; e++) y[e] = valid && c < width ? x[j][e] * rstd : 0;
      if constexpr (sizeof(T) == 4) {
        *reinterpret_cast<float4*>(to + c) = make_float4(y[0], y[1], y[2], y[3]);
      } else if constexpr (kChunk == 8) {
        *reinterpret_cast<uint4*>(to + c) =
            make_uint4(pack<T>(y[0], y[1]), pack<T>(y[2], y[3]), pack<T>(y[4], y[5]), pack<T>(y[6], y[7]));
      } else {
        *reinterpret_cast<uint2*>(to + c) = make_uint2(pack<T>(y[0], y[1]), pack<T>(y[2], y[3]));
      }
    }
    return;
  }
  if constexpr (!kSaved) {
    float sum = 0, squares = 0;
    for (int c = sub; c < width; c += lanes) sum += to_float(from[c]) - origin;
    shift = sum_lanes(sum) / width;
    for (int c = sub; c < width; c += lanes) {
      const float x = (to_float(from[c]) - origin) - shift;
      squares = fmaf(x, x, squares);
    }
    rstd = rsqrtf(sum_lanes(squares) / width + eps);
    mean = origin + shift;
  }
  __syncwarp();  // everyone has read the first element
  for (int base = 0; base < columns; base += lanes) {
    const int c = base + sub;
    const float x = c < width && valid ? ((to_float(from[c]) - origin) - shift) * rstd : 0;
    __syncwarp();  // an element of T lies where one of X lay that was read now or before
    if (c < columns) to[c] = from_float<T>(x);
  }
}

// Adds kWords values of a lane, by reference at(0), at(1), ..., over the `parts` warps of its group, which share a step's columns:
// every warp adds them in the same order. `exchange` has kWords floats for every thread.
template <int kWords, class At>
__device__ __forceinline__ void join_parts(int parts, float* exchange, At&& at) {
  if (parts == 1) return;
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32 / parts;
  float* mine = exchange + static_cast<int>(threadIdx.x) * kWords;
#pragma unroll
  for (int e = 0; e < kWords; e++) mine[e] = at(e);
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kWords; e++) at(e) = 0;
  for (int part = 0; part < parts; part++) {
    const float* other = exchange + ((group * parts + part) * 32 + lane) * kWords;
#pragma unroll
    for (int e = 0; e < kWords; e++) at(e) += other[e];
  }
}

// A warp's view of its group's ring.
template <class X>
struct TokenRing {
  const Tokens& tokens;
  const TokenPlan& plan;
  unsigned char* buffers;  // of the group: stages x 16 rows
  std::int64_t image;
  int part, lanes;
  int first_tile, tiles;  // this warp's columns, 16 to a tile

  __device__ __forceinline__ TokenRing(const Tokens& tokens, const TokenPlan& plan, unsigned char* rings,
                                       std::int64_t image)
      : tokens(tokens), plan(plan), image(image) {
    const int warp = threadIdx.x / 32;
    part = warp % plan.parts;
    buffers = rings + warp / plan.parts * (plan.stages * kStepTokens * plan.row_bytes);
    lanes = plan.lanes;
    const int all = plan.columns / 16, each = (all + plan.parts - 1) / plan.parts;
    first_tile = min(part * each, all);
    tiles = min(all - first_tile, each);
  }

  __device__ __forceinline__ unsigned char* buffer(int stage) const {
    return buffers + stage * (kStepTokens * plan.row_bytes);
  }

  // f(row, sub) for this warp's share of a step's rows, `lanes` lanes to a row.
  template <class F>
  __device__ __forceinline__ void for_each_row(F&& f) const {
    const int lane = threadIdx.x % 32, rows = kStepTokens / plan.parts;
    for (int row = 0; row < rows; row += 32 / lanes) f(part * rows + row + lane / lanes, lane % lanes);
  }

  // Begins to copy a step's tokens.
  __device__ __forceinline__ void fill(int stage, int step) const {
    unsigned char* to = buffer(stage);
    for_each_row([&](int row, int sub) {
      const int token = step * kStepTokens + row;
      X* at = reinterpret_cast<X*>(to + row * plan.row_bytes);
      if (token == 0) {
        for (int c = sub; c < tokens.width; c += lanes)
          at[c] = from_float<X>(load(tokens.cls, tokens.cls_dtype, image * tokens.cls_stride + c));
      } else if (token <= tokens.patches) {
        const X* from = static_cast<const X*>(tokens.data) + image * tokens.batch_stride +
                        static_cast<std::int64_t>(token - 1) * tokens.token_stride;
        if (tokens.aligned) {
          constexpr int kChunk = Chunk<X>::kSize;
          for (int c = sub * kChunk; c < tokens.width; c += lanes * kChunk) ptx::copy_async(at + c, from + c);
        } else {
          for (int c = sub; c < tokens.width; c += lanes) at[c] = from[c];
        }
      } else if (sub == 0) {
        at[0] = from_float<X>(0);  // LayerNorm looks at it
      }
    });
  }

  // Waits for the oldest buffer of the ring, with stages - 2 behind it in flight.
  __device__ __forceinline__ void wait() const {
    if (plan.stages == 2) {
      ptx::wait_copies<0>();
    } else if (plan.stages == 3) {
      ptx::wait_copies<1>();
    } else {
      ptx::wait_copies<2>();
    }
  }

  // The warps of a group meet; so do the block's, where a group is more than a warp.
  __device__ __forceinline__ void sync() const {
    if (plan.parts == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // use(step, rows) for every step of the group, all of [first, last) together; `prepare` runs while the first copies do.
  template <class Prepare, class Use>
  __device__ __forceinline__ void for_each_step(int first, int last, Prepare&& prepare, Use&& use) const {
    const int warp_groups = kTokenWarps / plan.parts, group = threadIdx.x / 32 / plan.parts;
    const int ahead = plan.stages - 1;
    for (int i = 0; i < ahead; i++) {
      const int step = first + group + i * warp_groups;
      if (step < last) fill(i, step);
      ptx::commit_copies();
    }
    prepare();
    __syncthreads();
    int stage = 0, next = ahead;
    // Warps that meet at barriers take the same number of rounds, with no tokens in the last.
    for (int step = first + group; plan.parts == 1 ? step < last : step - group < last; step += warp_groups) {
      wait();
      sync();
      if (step + ahead * warp_groups < last) fill(next, step + ahead * warp_groups);
      ptx::commit_copies();
      use(step, buffer(stage), step < last);
      stage = stage == ahead ? 0 : stage + 1;
      next = next == ahead ? 0 : next + 1;
    }
    ptx::wait_copies<0>();
  }
};

}  // namespace crossvit::cuda
