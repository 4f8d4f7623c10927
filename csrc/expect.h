// What a native op asks of its arguments before it allocates or touches memory, the same on the CPU and on CUDA: comparisons of
// integers. A message is made only where one of them fails, and names the argument, what was expected and what came.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace crossvit {

// The tensors that a namespace's kernels take: of this device type, float32, bfloat16 and, of these, float16.
struct Taken {
  c10::DeviceType device;
  bool float16;
};

// Sizes, of which kAny in what is expected stands for one that is free.
using Sizes = std::initializer_list<std::int64_t>;
constexpr std::int64_t kAny = -1;

// No memory holds as many elements; four bytes for each of them, and what a kernel rounds up to, are still counted in 64 bits.
constexpr std::int64_t kMostElements = std::int64_t{1} << 56;
// Along a side of an image: float32 tells neighbouring pixels apart up to here.
constexpr std::int64_t kLongestSide = (std::int64_t{1} << 24) - 1;

class Expect {
 public:
  // op: whose arguments these are. first: its main activation, on whose device all others are.
  Expect(const char* op, Taken taken, const char* name, const at::Tensor& first)
      : op_(op), first_name_(name), taken_(taken), device_(taken.device) {
    if (!first.defined()) missing(name);
    device_ = first.device();
    if (device_.type() != taken.device) [[unlikely]]
      fail(name, c10::DeviceTypeName(taken.device, true), device_.str());
    plain(name, first);
  }

  // A tensor of these sizes, whatever its strides.
  void tensor(const char* name, const at::Tensor& t, Sizes sizes) const {
    plain(name, t);
    if (!has(t, sizes)) [[unlikely]]
      fail(name, "shape " + text(sizes), shape(t));
  }
  // One that the kernels read as `dtype`.
  void tensor(const char* name, const at::Tensor& t, Sizes sizes, at::ScalarType dtype) const {
    tensor(name, t, sizes);
    this->dtype(name, t, dtype);
  }
  void dtype(const char* name, const at::Tensor& t, at::ScalarType dtype) const {
    if (t.scalar_type() != dtype) [[unlikely]]
      fail(name, c10::toString(dtype), c10::toString(t.scalar_type()));
  }
  // One that kernels read as rows of `dtype` or of float32.
  void activation(const char* name, const at::Tensor& t, at::ScalarType dtype) const {
    if (t.scalar_type() != dtype && t.scalar_type() != at::kFloat) [[unlikely]]
      fail(name, std::string(c10::toString(at::kFloat)) + " or the weight's " + c10::toString(dtype),
           c10::toString(t.scalar_type()));
  }
  // A tensor (..., width) with the leading sizes of `like`, which has been looked at.
  void beside(const char* name, const at::Tensor& t, const at::Tensor& like, std::int64_t width) const {
    plain(name, t);
    const auto sizes = t.sizes(), wanted = like.sizes();
    bool same = sizes.size() == wanted.size();
    for (std::size_t d = 0; same && d < sizes.size(); d++)
      same = sizes[d] == (d + 1 < sizes.size() ? wanted[d] : width);
    if (!same) [[unlikely]] {
      auto expected = wanted.vec();
      expected.back() = width;
      fail(name, "shape " + text(expected), shape(t));
    }
  }
  // A LayerNorm's or a Linear's vector, contiguous; it may be absent.
  void vector(const char* name, const at::Tensor& t, std::int64_t size) const {
    tensor(name, t, {size});
    contiguous(name, t);
  }
  void vector(const char* name, const std::optional<at::Tensor>& t, std::int64_t size) const {
    if (t) vector(name, *t, size);
  }
  // What a forward saved: contiguous and, where nothing else is said, of float32.
  void saved(const char* name, const at::Tensor& t, Sizes sizes, at::ScalarType dtype = at::kFloat) const {
    tensor(name, t, sizes, dtype);
    contiguous(name, t);
  }

  // A value for each of the samples of x: (B, 1, ..., 1), with the dimensions of x.
  void per_sample(const char* name, const at::Tensor& t, const at::Tensor& x) const {
    plain(name, t);
    const auto sizes = t.sizes();
    if (x.dim() < 2 || t.dim() != x.dim() || sizes[0] != x.sizes()[0] || t.numel() != sizes[0]) [[unlikely]]
      fail(name, "a value per sample, with as many dimensions as " + shape(x), "shape " + shape(t));
  }

  // Rows (..., width) of at least one element.
  void rows(const char* name, const at::Tensor& t) const {
    if (t.dim() == 0 || t.numel() == 0) [[unlikely]]
      fail(name, "a tensor (..., D) that is not empty", "shape " + shape(t));
  }
  void rank(const char* name, const at::Tensor& t, std::int64_t dims) const {
    plain(name, t);
    if (t.dim() != dims || t.numel() == 0) [[unlikely]]
      fail(name, "a tensor of " + std::to_string(dims) + " dimensions that is not empty", "shape " + shape(t));
  }
  // A weight (any number of rows, columns).
  void matrix(const char* name, const at::Tensor& t, std::int64_t columns) const {
    tensor(name, t, {kAny, columns});
    if (t.size(0) == 0) [[unlikely]]
      fail(name, "at least one row", "shape " + shape(t));
  }
  void heads(std::int64_t heads, std::int64_t width) const {
    if (heads <= 0 || width % heads != 0) [[unlikely]]
      fail("num_heads", "a divisor of " + std::to_string(width), std::to_string(heads));
  }
  void epsilon(double eps) const {
    if (!(eps >= 0)) [[unlikely]]
      fail("eps", "at least 0", std::to_string(eps));
  }
  void side(const char* name, std::int64_t size) const {
    if (size < 1 || size > kLongestSide) [[unlikely]]
      fail(name, "1 to " + std::to_string(kLongestSide), std::to_string(size));
  }
  // So many rows of so many elements can be counted.
  void countable(const char* name, std::int64_t rows, std::int64_t features) const {
    std::int64_t all = 0;
    if (__builtin_mul_overflow(rows, features, &all) || all > kMostElements) [[unlikely]]
      fail(name, "fewer elements than " + std::to_string(kMostElements),
           std::to_string(rows) + " rows of " + std::to_string(features));
  }
  // The length of `needs`.
  void needs(const c10::List<bool>& needs, std::size_t gradients) const {
    if (needs.size() != gradients) [[unlikely]]
      fail("needs", std::to_string(gradients) + " entries", std::to_string(needs.size()));
  }
  // That the gradient of an argument which is not there is not asked for.
  void needed(const char* name, bool needed, const std::optional<at::Tensor>& t) const {
    if (needed && !t) [[unlikely]]
      fail(name, "a tensor, whose gradient is asked for", "None");
  }

  [[noreturn]] void fail(const char* name, const std::string& expected, const std::string& came) const {
    throw std::invalid_argument(std::string(op_) + ": " + name + ": expected " + expected + ", got " + came);
  }

 private:
  // A dense tensor of a dtype that the kernels take, on the device of the first, all of whose elements lie in its memory (which
  // a storage that was made smaller no longer holds).
  void plain(const char* name, const at::Tensor& t) const {
    if (!t.defined()) [[unlikely]]
      missing(name);
    const at::ScalarType dtype = t.scalar_type();
    if (t.layout() != at::kStrided) [[unlikely]]
      fail(name, "a dense tensor", c10::str(t.layout()));
    if (dtype != at::kFloat && dtype != at::kBFloat16 && !(taken_.float16 && dtype == at::kHalf)) [[unlikely]]
      fail(name, taken_.float16 ? "float32, bfloat16 or float16" : "float32 or bfloat16", c10::toString(dtype));
    if (t.device() != device_) [[unlikely]]
      fail(name, device_.str() + " as " + first_name_ + " is on", t.device().str());
    if (!in_memory(t)) [[unlikely]]
      fail(name, "memory of its own",
           "a storage of " + std::to_string(t.storage().nbytes()) + " bytes for " + shape(t));
  }
  void contiguous(const char* name, const at::Tensor& t) const {
    if (!t.is_contiguous()) [[unlikely]]
      fail(name, "a contiguous tensor", "strides " + text(t.strides()));
  }
  [[noreturn]] void missing(const char* name) const { fail(name, "a tensor", "None"); }

  static bool has(const at::Tensor& t, Sizes expected) {
    const auto sizes = t.sizes();
    if (sizes.size() != expected.size()) return false;
    const std::int64_t* size = sizes.data();
    for (const std::int64_t wanted : expected)
      if (const std::int64_t here = *size++; wanted != here && wanted != kAny) return false;
    return true;
  }
  static bool in_memory(const at::Tensor& t) {
    const auto sizes = t.sizes(), strides = t.strides();
    std::int64_t last = t.storage_offset();
    for (std::size_t d = 0; d < sizes.size(); d++) {
      if (sizes[d] == 0) return true;
      last += (sizes[d] - 1) * strides[d];
    }
    return (last + 1) * static_cast<std::int64_t>(t.itemsize()) <= static_cast<std::int64_t>(t.storage().nbytes());
  }

  static std::string shape(const at::Tensor& t) { return text(t.sizes()); }
  template <class Range>
  static std::string text(const Range& sizes) {
    std::ostringstream out;
    const char* before = "(";
    for (const std::int64_t size : sizes) {
      out << before;
      if (size == kAny) {
        out << "any";
      } else {
        out << size;
      }
      before = ", ";
    }
    out << (sizes.size() == 0 ? "()" : sizes.size() == 1 ? ",)" : ")");
    return out.str();
  }

  const char* op_;
  const char* first_name_;
  Taken taken_;
  c10::Device device_;
};

}  // namespace crossvit
