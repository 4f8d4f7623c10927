// The steps cls_query and cls_value of cls_cross_attention, before and after the pass over the tokens: 16 images and one head to a
// block.
#include "cuda/cls_rows.cuh"

#include "cuda/cls_contexts.cuh"
#include "cuda/cls_query.cuh"
#include "cuda/launch.cuh"

namespace crossvit::cuda {

namespace {

template <class T, bool kTf32>
__global__ void __launch_bounds__(kRowThreads, 1) cls_query_kernel(const ClsQuery a, const Tiles tiles) {
  const HeadQuery<T, kTf32> of_head(a, tiles);
  T* const y = reinterpret_cast<T*>(ptx::shared_memory());
  T* const q = y + kImages * of_head.y_stride;
  T* const buffers = q + query_parts<T> * kImages * of_head.q_stride;
  const int buffer = of_head.tile_elements(a.width, of_head.d, tiles);
  stream_tiles(
      of_head.q_steps + of_head.k_steps, 2, [&](int step, int stage) { of_head.fill(step, buffers + stage * buffer); },
      [&] {
        const std::int64_t bytes = of_head.image * a.cls_stride * (a.cls_dtype == DType::float32 ? 4 : 2);
        layer_norm_rows(static_cast<const char*>(a.cls) + bytes, a.cls_dtype, a.cls_stride, of_head.rows, a.width,
                        a.eps, Affine{a.norm_weight, a.norm_bias}, y, of_head.y_stride, [](float x) { return x; });
      },
      [&](int step, int stage) { of_head.use(step, buffers + stage * buffer, y, q); });
}

template <class T, bool kTf32>
__global__ void __launch_bounds__(kRowThreads, 1) cls_value_kernel(const ClsValue a, const Tiles tiles) {
  const auto [head, rows, image] = Place(a.heads, a.batch);
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
  stream_tiles((d + tiles.rows - 1) / tiles.rows, 2, fill, join, [&](int step, int stage) {
    const int first = step * tiles.rows;
    rows_by_rows<kTf32>(y, stride, buffers + stage * tiles.rows * stride, stride,
                        min(round_up(d, 16) - first, tiles.rows), columns, [&](int row, int column, float v) {
                          const int j = first + column;
                          if (j >= d || row >= rows) return;
                          v += load_or_zero(a.v_bias, head * d + j);
                          static_cast<T*>(a.out)[(image + row) * a.width + head * d + j] = from_float<T>(v);
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
  const std::int64_t buffer = HeadQuery<T, kTf32>::tile_elements(a.width, a.width / a.heads, tiles) * sizeof(T);
  return launch(cls_query_kernel<T, kTf32>, blocks_of(a.batch) * a.heads, kRowThreads, fixed + 2 * buffer, stream, a,
                tiles);
}

template <class T, bool kTf32>
Error launch_value(const ClsValue& a, Stream stream) {
  const std::int64_t row = odd_stride<T>(round_up(a.width, 16)) * sizeof(T);
  const std::int64_t fixed = kImages * row + kShares * sizeof(float);
  const Tiles tiles{tile_size(a.width / a.heads, row, (kSharedMemory - fixed) / 2), 0};
  return launch(cls_value_kernel<T, kTf32>, blocks_of(a.batch) * a.heads, kRowThreads, fixed + 2 * tiles.rows * row,
                stream, a, tiles);
}

}  // namespace

Error cls_query(const ClsQuery& args, Stream stream) {
  return with_math(args.dtype, args.tf32, [&]<class T, bool kTf32>() { return launch_query<T, kTf32>(args, stream); });
}

Error cls_value(const ClsValue& args, Stream stream) {
  return with_math(args.dtype, args.tf32, [&]<class T, bool kTf32>() { return launch_value<T, kTf32>(args, stream); });
}

}  // namespace crossvit::cuda
