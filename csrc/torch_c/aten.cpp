#include "torch_c/aten.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>

#include "torch_c/op.h"

namespace crossvit::aten {

namespace {

// By the schemas of this PyTorch are the arguments below, whichever runs.
inline constexpr std::uint64_t kSchemas = TORCH_TARGET_VERSION;

StableIValue none() { return 0; }

StableIValue integers(Sizes values) {
  StableListHandle list = nullptr;
  checked(torch_new_list_reserve_size(values.size(), &list));
  for (const std::int64_t value : values) checked(torch_list_push_back(list, boxing::stable(value)));
  return boxing::stable(list);
}

StableIValue optional(StableIValue value) { return boxing::stable(new StableIValue(value)); }

// The one result of an op, which owns what it is given.
Tensor call(const char* name, const char* overload, StableIValue* arguments) {
  checked(torch_call_dispatcher(name, overload, arguments, kSchemas));
  return Tensor(boxing::plain<AtenTensorHandle>(arguments[0]));
}

// The one result of a function of the C interface.
template <class Function, class... Arguments>
Tensor made(Function function, Arguments... arguments) {
  AtenTensorHandle result = nullptr;
  checked(function(arguments..., &result));
  return Tensor(result);
}

Tensor reduced(const char* name, const char* overload, const Tensor& t, Sizes dims, bool keep,
               std::optional<ScalarType> dtype) {
  const StableIValue type = dtype ? optional(boxing::stable(static_cast<std::int32_t>(*dtype))) : none();
  StableIValue arguments[] = {boxing::give(t), optional(integers(dims)), boxing::stable(keep), type};
  return call(name, overload, arguments);
}

// The sums of up to four rows, which PyTorch adds one behind the other whatever its vectors and threads; its dispatcher takes
// longer than they do.
template <class T>
Tensor sum_of_few(const Tensor& t, Sizes shape, std::int64_t rows) {
  Tensor result = empty(shape, t.scalar_type(), t.device());
  const std::int64_t width = result.numel();
  const T* from = t.const_data_ptr<T>();
  T* to = result.data_ptr<T>();
  for (std::int64_t i = 0; i < width; i++) {
    T sum = 0;
    for (std::int64_t row = 0; row < rows; row++) sum += from[row * width + i];
    to[i] = sum;
  }
  return result;
}

}  // namespace

Tensor gelu(const Tensor& t) {
  StringHandle exact = nullptr;
  checked(torch_new_string_handle("none", 4, &exact));
  StableIValue arguments[] = {boxing::give(t), boxing::stable(exact)};
  return call("aten::gelu", "", arguments);
}

Tensor sum(const Tensor& t, Sizes dims, bool keep, std::optional<ScalarType> dtype) {
  constexpr std::int64_t kFirst[] = {0, 1};
  const bool of_rows = dims.size() <= 2 && std::equal(dims.begin(), dims.end(), kFirst);
  if (of_rows && !keep && !dtype && t.device().type == kCPU && t.is_contiguous()) {
    std::int64_t rows = 1;
    for (const std::int64_t d : dims) rows *= t.size(d);
    const Sizes shape(t.sizes().begin() + dims.size(), t.sizes().size() - dims.size());
    if (rows <= 4 && t.scalar_type() == kFloat32) return sum_of_few<float>(t, shape, rows);
    if (rows <= 4 && t.scalar_type() == kFloat64) return sum_of_few<double>(t, shape, rows);
  }
  return reduced("aten::sum", "dim_IntList", t, dims, keep, dtype);
}

Tensor mean(const Tensor& t, Sizes dims, bool keep) { return reduced("aten::mean", "dim", t, dims, keep, {}); }

Tensor mul(const Tensor& a, const Tensor& b) {
  if (a.device().type == kCPU) return made(aoti_torch_cpu_mul_Tensor, a.handle(), b.handle());
  StableIValue arguments[] = {boxing::give(a), boxing::give(b)};
  return call("aten::mul", "Tensor", arguments);
}

Tensor add(const Tensor& a, const Tensor& b, double alpha) {
  return made(aoti_torch_cpu_add_Tensor, a.handle(), b.handle(), alpha);
}

Tensor mul(const Tensor& a, double b) { return made(aoti_torch_cpu_mul_Scalar, a.handle(), b); }

Tensor mm(const Tensor& a, const Tensor& b) {
  Tensor result = empty({a.size(0), b.size(1)}, a.scalar_type(), a.device());
  checked(aoti_torch_cpu_mm_out(result.handle(), a.handle(), b.handle()));
  return result;
}

Tensor bmm(const Tensor& a, const Tensor& b) {
  Tensor result = empty({a.size(0), a.size(1), b.size(2)}, a.scalar_type(), a.device());
  checked(aoti_torch_cpu_bmm_out(result.handle(), a.handle(), b.handle()));
  return result;
}

}  // namespace crossvit::aten
