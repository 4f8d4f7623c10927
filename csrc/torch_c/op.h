// How a C++ function becomes an op of PyTorch's dispatcher by way of the stable C interface, which hands arguments over as a row of
// 64-bit values, those of a tensor, an optional, a list and a string being pointers that the callee owns.
#pragma once

#include <cstring>
#include <tuple>

#include "torch_c/tensor.h"

namespace crossvit {

// Which gradients a backward is asked for: a list of bools, as far as 64.
class NeedsList {
 public:
  explicit NeedsList(StableListHandle owned);
  std::size_t size() const { return size_; }
  bool get(std::size_t i) const { return bits_ >> i & 1; }

 private:
  std::size_t size_ = 0;
  std::uint64_t bits_ = 0;
};

namespace boxing {

// A value that is no pointer: its bytes are the first ones.
template <class T>
T plain(StableIValue value) {
  T result;
  std::memcpy(&result, &value, sizeof(T));
  return result;
}
template <class T>
StableIValue stable(T value) {
  StableIValue result = 0;
  std::memcpy(&result, &value, sizeof(T));
  return result;
}

template <class T>
struct Argument {  // std::int64_t, double, bool
  static T take(StableIValue value) { return plain<T>(value); }
};
template <>
struct Argument<Tensor> {
  static Tensor take(StableIValue value) { return Tensor(plain<AtenTensorHandle>(value)); }
};
template <>
struct Argument<OptionalTensor> {
  static OptionalTensor take(StableIValue value) {
    auto* given = plain<StableIValue*>(value);
    if (!given) return {};
    Tensor result(plain<AtenTensorHandle>(*given));
    delete given;
    if (!result.defined()) return {};
    return result;
  }
};
template <>
struct Argument<NeedsList> {
  static NeedsList take(StableIValue value) { return NeedsList(plain<StableListHandle>(value)); }
};
template <>
struct Argument<std::string> {
  static std::string take(StableIValue value);
};

inline StableIValue give(bool value) { return stable(value); }
inline StableIValue give(Tensor result) {
  AtenTensorHandle handle = std::move(result).release();
  if (!handle) checked(aoti_torch_new_uninitialized_tensor(&handle));
  return stable(handle);
}
inline StableIValue give(OptionalTensor result) {
  return stable(result ? new StableIValue(give(std::move(*result))) : nullptr);
}
StableIValue give(std::vector<Tensor> results);
StableIValue give(const std::string& result);

template <class Result>
void give_all(StableIValue* stack, Result&& result) {
  stack[0] = give(std::forward<Result>(result));
}
template <class... Results>
void give_all(StableIValue* stack, std::tuple<Results...>&& results) {
  std::size_t i = 0;
  std::apply([&](auto&... result) { ((stack[i++] = give(std::move(result))), ...); }, results);
}

[[noreturn]] void wrong_count(std::uint64_t expected, std::uint64_t came);

template <auto function, class Result, class... Arguments, std::size_t... i>
void call(Result (*)(Arguments...), StableIValue* stack, std::index_sequence<i...>) {
  std::tuple<std::remove_cvref_t<Arguments>...> arguments{Argument<std::remove_cvref_t<Arguments>>::take(stack[i])...};
  if constexpr (std::is_void_v<Result>) {
    std::apply(function, arguments);
  } else {
    give_all(stack, std::apply(function, arguments));
  }
}

template <class Result, class... Arguments>
constexpr std::size_t count(Result (*)(Arguments...)) {
  return sizeof...(Arguments);
}

template <auto function>
void boxed(StableIValue* stack, std::uint64_t arguments, std::uint64_t) {
  constexpr std::size_t expected = count(function);
  if (arguments != expected) wrong_count(expected, arguments);
  call<function>(function, stack, std::make_index_sequence<expected>());
}

}  // namespace boxing

// The ops of a namespace, for a dispatch key; they are gone when this is.
class Library {
 public:
  Library(const char* space, const char* dispatch_key);
  ~Library();
  Library(Library&& other) noexcept
      : space_(std::move(other.space_)),
        definitions_(std::exchange(other.definitions_, nullptr)),
        implementations_(std::exchange(other.implementations_, nullptr)) {}
  Library& operator=(Library&&) = delete;

  // An op whose arguments are of the types that the schema says.
  template <auto function>
  Library&& define(const std::string& schema) && {
    define(schema, &boxing::boxed<function>);
    return std::move(*this);
  }

 private:
  void define(const std::string& schema, void (*function)(StableIValue*, std::uint64_t, std::uint64_t));

  std::string space_;
  TorchLibraryHandle definitions_ = nullptr, implementations_ = nullptr;
};

}  // namespace crossvit
