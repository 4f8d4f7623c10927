// cls_cross_attention before and after the pass over the tokens, 16 images and one head to a block.
#include "cuda/cls_rows.cuh"

#include "cuda/cls_contexts.cuh"
#include "cuda/launch.cuh"

namespace crossvit::cuda {

namespace {

// 16 bits would cost sharp scores their place, so that the query goes on as the sum of two numbers.
template <class T>
constexpr int query_parts = sizeof(T) == 2 ? 2 : 1;

// Tiles of the weights: rows of W_q or W_v, and columns of W_k.
struct Tiles {
  int rows, columns;
};

template <class T, bool kTf32>
__global__ void __launch_bounds__(kRowThreads, 1) query_kernel(const ClsQuery a, const Tiles tiles) {
  constexpr int kParts = query_parts<T>;
  const int head = blockIdx.x % a.heads;
  const std::int64_t image = static_cast<std::int64_t>(blockIdx.x / a.heads) * kImages;
  const int rows = static_cast<int>(min(a.batch - image, static_cast<std::int64_t>(kImages)));
  const int d = a.width / a.heads, padded_d = round_up(d, 16), columns = round_up(a.width, 16);
  const int y_stride = odd_stride<T>(columns), q_stride = odd_stride<T>(padded_d);
  const int k_stride = odd_stride<T>(tiles.columns);
  T* const y = reinterpret_cast<T*>(ptx::shared_memory());
  T* const q = y + kImages * y_stride;
  T* const buffers = q + kParts * kImages * q_stride;
  const int buffer = max(tiles.rows * y_stride, padded_d * k_stride);

  const MatrixView q_weight{a.q_weight, a.width, a.aligned}, k_weight{a.k_weight, a.width, a.aligned};
  const int q_steps = (d + tiles.rows - 1) / tiles.rows, k_steps = (a.width + tiles.columns - 1) / tiles.columns;
  const float scale = 1 / sqrtf(static_cast<float>(d));
  const auto fill = [&](int step, int stage) {
    T* tile = buffers + stage * buffer;
    if (step < q_steps) {
      const int j = step * tiles.rows;
      fill_tile(tile, y_stride, q_weight, head * d + j, min(d - j, tiles.rows), 0, a.width);
    } else {
      const int c = (step - q_steps) * tiles.columns;
      fill_tile(tile, k_stride, k_weight, head * d, d, c, min(a.width - c, tiles.columns));
    }
  };
  const auto normalize = [&] {
    layer_norm_rows(static_cast<const char*>(a.cls) + image * a.cls_stride * (a.cls_type == Type::float32 ? 4 : 2),
                    a.cls_type, a.cls_stride, rows, a.width, a.eps, Affine{a.norm_weight, a.norm_bias}, y, y_stride,
                    [](float x) { return x; });
  };
  stream_tiles(q_steps + k_steps, fill, normalize, [&](int step, int stage) {
    const T* tile = buffers + stage * buffer;
    if (step < q_steps) {
      const int first = step * tiles.rows;
      rows_by_rows<kTf32>(y, y_stride, tile, y_stride, min(padded_d - first, tiles.rows), columns,
                          [&](int row, int column, float v0, float v1) {
                            const float v[2] = {v0, v1};
#pragma unroll
                            for (int e = 0; e < 2; e++) {
                              const int j = first + column + e;
                              float value = 0;
                              if (j < d) {
                                value = v[e];
                                if (a.q_bias.data) value += load(a.q_bias.data, a.q_bias.type, head * d + j);
                                if (a.query && row < rows) a.query[(image + row) * a.width + head * d + j] = value;
                              }
                              const T high = from_float<T>(value);
                              q[row * q_stride + j] = high;
                              if constexpr (kParts == 2)
                                q[(kImages + row) * q_stride + j] = from_float<T>(remainder_of(value, high));
                            }
                          });
    } else {
      const int first = (step - q_steps) * tiles.columns;
      rows_by_columns<kTf32>(q, q_stride, kParts, tile, k_stride, round_up(min(a.width - first, tiles.columns), 16),
                             padded_d, [&](int row, int column, float v0, float v1) {
                               const int c = first + column;
                               if (row >= rows) return;
                               float* to = a.key_query + ((image + row) * a.heads + head) * a.width + c;
                               if (c < a.width) to[0] = v0 * scale;
                               if (c + 1 < a.width) to[1] = v1 * scale;
                             });
    }
  });
}

template <class T, bool kTf32>
__global__ void __launch_bounds__(kRowThreads, 1) value_kernel(const ClsValue a, const Tiles tiles) {
  const int head = blockIdx.x % a.heads;
  const std::int64_t image = static_cast<std::int64_t>(blockIdx.x / a.heads) * kImages;
  const int rows = static_cast<int>(min(a.batch - image, static_cast<std::int64_t>(kImages)));
  const int d = a.width / a.heads, columns = round_up(a.width, 16), stride = odd_stride<T>(columns);
  T* const y = reinterpret_cast<T*>(ptx::shared_memory());
  T* const buffers = y + kImages * stride;
  float* const shares = reinterpret_cast<float*>(buffers + 2 * tiles.rows * stride);

  const MatrixView v_weight{a.v_weight, a.width, a.aligned};
  const auto fill = [&](int step, int stage) {
    const int j = step * tiles.rows;
    fill_tile(buffers + stage * tiles.rows * stride, stride, v_weight, head * d + j, min(d - j, tiles.rows), 0,
              a.width);
  };
  const auto join = [&] {
    read_shares(a.contexts, image, rows, a.heads, head, shares);
    join_contexts(a.contexts, image, rows, a.heads, head, a.width, Affine{a.norm_weight, a.norm_bias}, shares, y,
                  stride);
    if (!a.probs) return;
    for (int r = 0; r < rows; r++) {
      float* probs = a.probs + ((image + r) * a.heads + head) * a.tokens;
      const float highest = shares[r * 34 + 32], total = shares[r * 34 + 33];
      for (int n = threadIdx.x; n < a.tokens; n += kRowThreads) probs[n] = expf(probs[n] - highest) / total;
    }
  };
  stream_tiles((d + tiles.rows - 1) / tiles.rows, fill, join, [&](int step, int stage) {
    const int first = step * tiles.rows;
    rows_by_rows<kTf32>(y, stride, buffers + stage * tiles.rows * stride, stride,
                        min(round_up(d, 16) - first, tiles.rows), columns,
                        [&](int row, int column, float v0, float v1) {
                          const float v[2] = {v0, v1};
#pragma unroll
                          for (int e = 0; e < 2; e++) {
                            const int j = first + column + e;
                            if (j >= d || row >= rows) continue;
                            const float bias = a.v_bias.data ? load(a.v_bias.data, a.v_bias.type, head * d + j) : 0;
                            static_cast<T*>(a.out)[(image + row) * a.width + head * d + j] = from_float<T>(v[e] + bias);
                          }
                        });
  });
}

template <class T, bool kTf32>
Error launch_query(const ClsQuery& a, Stream stream) {
  const int d = round_up(a.width / a.heads, 16), columns = round_up(a.width, 16);
  const std::int64_t row = odd_stride<T>(columns) * sizeof(T);
  const std::int64_t fixed = kImages * (row + query_parts<T> * odd_stride<T>(d) * sizeof(T));
  const std::int64_t room = (kSharedMemory - fixed) / 2;
  const Tiles tiles{tile_size(d, row, room), tile_size(columns, d * sizeof(T), room - 16 * d)};
  const std::int64_t buffer =
      std::max<std::int64_t>(tiles.rows * row, d * odd_stride<T>(tiles.columns) * static_cast<int>(sizeof(T)));
  const dim3 grid(static_cast<unsigned>((a.batch + kImages - 1) / kImages * a.heads));
  return launch(query_kernel<T, kTf32>, grid, kRowThreads, fixed + 2 * buffer, stream, a, tiles);
}

template <class T, bool kTf32>
Error launch_value(const ClsValue& a, Stream stream) {
  const std::int64_t row = odd_stride<T>(round_up(a.width, 16)) * sizeof(T);
  const std::int64_t fixed = kImages * row + kShares * sizeof(float);
  const Tiles tiles{tile_size(a.width / a.heads, row, (kSharedMemory - fixed) / 2), 0};
  const dim3 grid(static_cast<unsigned>((a.batch + kImages - 1) / kImages * a.heads));
  return launch(value_kernel<T, kTf32>, grid, kRowThreads, fixed + 2 * tiles.rows * row, stream, a, tiles);
}

}  // namespace

Error cls_query(const ClsQuery& args, Stream stream) {
  return with_math(args.type, args.tf32, [&]<class T, bool kTf32>() { return launch_query<T, kTf32>(args, stream); });
}

Error cls_value(const ClsValue& args, Stream stream) {
  return with_math(args.type, args.tf32, [&]<class T, bool kTf32>() { return launch_value<T, kTf32>(args, stream); });
}

}  // namespace crossvit::cuda
