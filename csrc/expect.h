// What a native op asks of its arguments before it allocates or touches memory, the same on the CPU and on CUDA: comparisons of
// integers. A message is made only where one of them fails, and names the argument, what was expected and what came.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "torch_c/op.h"

namespace crossvit {

// The tensors that a library's kernels take: of this device type, float32, bfloat16 and, of these, float16.
struct Taken {
  DeviceType device;
  bool float16;
  bool takes(ScalarType dtype) const {
    return dtype == kFloat32 || dtype == kBFloat16 || (float16 && dtype == kFloat16);
  }
};
Taken taken();  // by those of this library

// Whether all elements of a dense tensor lie in its memory, which a storage that was made smaller no longer holds.
inline bool in_memory(const Tensor& t) {
  if (t.numel() == 0) return true;
  int64_t end = t.storage_offset() + 1;
  for (int64_t d = 0; d < t.dim(); d++) end += (t.size(d) - 1) * t.stride(d);
  const auto dtype = t.scalar_type();
  const int64_t size = dtype == kFloat32 ? 4 : dtype == kFloat16 || dtype == kBFloat16 ? 2 : t.itemsize();
  return end * size <= t.storage_bytes();
}

// Among expected sizes, one that is free.
constexpr int64_t kAny = -1;

// No memory holds as many elements; four bytes for each of them, and what a kernel rounds up to, are still counted in 64 bits.
constexpr int64_t kMostElements = int64_t{1} << 56;
// Along a side of an image: float32 tells neighbouring pixels apart up to here.
constexpr int64_t kLongestSide = (int64_t{1} << 24) - 1;

class Expect {
 public:
  // These are the arguments of the op of this schema; main is its main activation, on whose device all others are.
  Expect(const char* schema, const char* name, const Tensor& main)
      : schema_(schema), main_name_(name), taken_(taken()), device_(main.device()) {
    if (!main.defined() || main.device().type != taken_.device) [[unlikely]]
      fail(name, "a tensor on " + name_of(taken_.device), main.defined() ? name_of(main.device()) : "None");
    plain(name, main);
  }

  // A tensor of these sizes, whatever its strides.
  void tensor(const char* name, const Tensor& t, Sizes sizes) const {
    plain(name, t);
    if (!has(t, sizes)) [[unlikely]]
      explain_shape(name, t, sizes);
  }
  // One that kernels read as `dtype`.
  void tensor(const char* name, const Tensor& t, Sizes sizes, ScalarType dtype) const {
    tensor(name, t, sizes);
    of_dtype(name, t, dtype);
  }
  void of_dtype(const char* name, const Tensor& t, ScalarType dtype) const {
    if (t.scalar_type() != dtype) [[unlikely]]
      fail(name, name_of(dtype), name_of(t.scalar_type()));
  }
  // One that kernels read as rows of `dtype`, the weight's, or of float32.
  void activation(const char* name, const Tensor& t, ScalarType dtype) const {
    if (t.scalar_type() != dtype && t.scalar_type() != kFloat32) [[unlikely]]
      fail(name, name_of(dtype) + " as the weight, or float32", name_of(t.scalar_type()));
  }
  // A tensor (..., width) with the leading sizes of `like`, which has been looked at.
  void beside(const char* name, const Tensor& t, const Tensor& like, int64_t width) const {
    plain(name, t);
    const Sizes sizes = t.sizes(), wanted = like.sizes();
    bool same = sizes.size() == wanted.size() && sizes.back() == width;
    for (std::size_t d = 0; same && d + 1 < sizes.size(); d++) same = sizes[d] == wanted[d];
    if (!same) [[unlikely]]
      explain_beside(name, t, like, width);
  }
  // A LayerNorm's or a Linear's vector, contiguous; it may be absent.
  void vector(const char* name, const Tensor& t, int64_t size) const {
    if (!is_plain(t) || t.dim() != 1 || t.sizes()[0] != size || !t.is_contiguous()) [[unlikely]]
      explain_vector(name, t, size);
  }
  void vector(const char* name, const OptionalTensor& t, int64_t size) const {
    if (t) vector(name, *t, size);
  }
  // What a forward saved: contiguous and, where nothing else is said, of float32.
  void saved(const char* name, const Tensor& t, Sizes sizes, ScalarType dtype = kFloat32) const {
    tensor(name, t, sizes, dtype);
    contiguous(name, t);
  }
  // A value for each of the samples of x: (B, 1, ..., 1), with the dimensions of x.
  void per_sample(const char* name, const Tensor& t, const Tensor& x) const {
    plain(name, t);
    if (x.dim() < 2 || t.dim() != x.dim() || t.sizes()[0] != x.sizes()[0] || t.numel() != t.sizes()[0]) [[unlikely]]
      fail(name, "a value per sample, with as many dimensions as " + text(x.sizes()), "shape " + text(t.sizes()));
  }

  // The main argument is rows (..., D) of at least one element.
  void rows(const char* name, const Tensor& t) const {
    if (t.numel() == 0 || t.dim() == 0) [[unlikely]]
      fail(name, "a tensor (..., D) that is not empty", "shape " + text(t.sizes()));
  }
  // A tensor of so many dimensions and at least one element.
  void rank(const char* name, const Tensor& t, int64_t dims) const {
    plain(name, t);
    if (t.dim() != dims || t.numel() == 0) [[unlikely]]
      fail(name, "a tensor of " + std::to_string(dims) + " dimensions that is not empty", "shape " + text(t.sizes()));
  }
  // A weight (any number of rows, columns).
  void matrix(const char* name, const Tensor& t, int64_t columns) const {
    plain(name, t);
    const Sizes sizes = t.sizes();
    if (sizes.size() != 2 || sizes[1] != columns || sizes[0] == 0) [[unlikely]]
      explain_shape(name, t, {kAny, columns});
  }
  void heads(int64_t heads, int64_t width) const {
    if (heads <= 0 || width % heads != 0) [[unlikely]]
      fail("num_heads", "a divisor of " + std::to_string(width), std::to_string(heads));
  }
  void epsilon(double eps) const {
    if (!(eps >= 0)) [[unlikely]]
      fail("eps", "at least 0", std::to_string(eps));
  }
  void side(const char* name, int64_t size) const {
    if (size < 1 || size > kLongestSide) [[unlikely]]
      fail(name, "1 to " + std::to_string(kLongestSide), std::to_string(size));
  }
  // So many rows of so many elements can be counted.
  void countable(const char* name, int64_t rows, int64_t features) const {
    int64_t all = 0;
    if (__builtin_mul_overflow(rows, features, &all) || all > kMostElements) [[unlikely]]
      fail(name, "fewer elements than " + std::to_string(kMostElements),
           std::to_string(rows) + " rows of " + std::to_string(features));
  }
  template <class Names>
  void needs(const Needs<Names>& needs) const {
    if (needs.given != needs.kGradients) [[unlikely]]
      fail("needs", std::to_string(needs.kGradients) + " entries", std::to_string(needs.given));
  }
  // The gradient of an argument is asked for only where the argument is given.
  void needed(const char* name, bool needed, const OptionalTensor& t) const {
    if (needed && !t) [[unlikely]]
      fail(name, "a tensor, whose gradient is asked for", "None");
  }

  [[noreturn, gnu::cold, gnu::noinline]] void fail(const char* name, const std::string& expected,
                                                   const std::string& came) const {
    const std::string op(schema_, std::strchr(schema_, '('));
    throw std::invalid_argument(op + ": " + name + ": expected " + expected + ", got " + came);
  }

 private:
  // A dense tensor of a dtype that the kernels take, on the device of the main one, and in_memory().
  bool is_plain(const Tensor& t) const {
    return t.defined() && taken_.takes(t.scalar_type()) && t.is_dense() && t.device() == device_ && in_memory(t);
  }
  void plain(const char* name, const Tensor& t) const {
    if (!is_plain(t)) [[unlikely]]
      explain(name, t);
  }
  void contiguous(const char* name, const Tensor& t) const {
    if (!t.is_contiguous()) [[unlikely]]
      fail(name, "a contiguous tensor", "strides " + text(t.strides()));
  }

  static bool has(const Tensor& t, Sizes expected) {
    const Sizes sizes = t.sizes();
    return std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end());
  }

  // What is wrong with a tensor that is not plain.
  [[noreturn, gnu::cold, gnu::noinline]] void explain(const char* name, const Tensor& t) const {
    if (!t.defined()) fail(name, "a tensor", "None");
    if (!t.is_dense()) fail(name, "a dense tensor", "one of another layout");
    if (!taken_.takes(t.scalar_type()))
      fail(name, taken_.float16 ? "float32, bfloat16 or float16" : "float32 or bfloat16", name_of(t.scalar_type()));
    if (t.device() != device_) fail(name, name_of(device_) + " as " + main_name_ + " is on", name_of(t.device()));
    fail(name, "memory of its own",
         "a storage of " + std::to_string(t.storage_bytes()) + " bytes for " + text(t.sizes()));
  }
  [[noreturn, gnu::cold, gnu::noinline]] void explain_shape(const char* name, const Tensor& t, Sizes expected) const {
    fail(name, "shape " + text(expected), text(t.sizes()));
  }
  [[gnu::cold, gnu::noinline]] void explain_vector(const char* name, const Tensor& t, int64_t size) const {
    tensor(name, t, {size});
    contiguous(name, t);
  }
  [[noreturn, gnu::cold, gnu::noinline]] void explain_beside(const char* name, const Tensor& t, const Tensor& like,
                                                             int64_t width) const {
    auto expected = like.sizes().vec();
    expected.back() = width;
    explain_shape(name, t, expected);
  }
  // Sizes as Python writes them.
  [[gnu::cold, gnu::noinline]] static std::string text(Sizes sizes) {
    std::string result = "(";
    for (std::size_t d = 0; d < sizes.size(); d++)
      result += (d ? ", " : "") + (sizes[d] == kAny ? "any" : std::to_string(sizes[d]));
    return result + (sizes.size() == 1 ? ",)" : ")");
  }

  const char* schema_;
  const char* main_name_;
  Taken taken_;
  Device device_;
};

}  // namespace crossvit
