// How a C++ function becomes an op of PyTorch's dispatcher by way of the stable C interface, which hands arguments over as a row of
// 64-bit values, those of a tensor, an optional, a list and a string being pointers that the callee owns.
#pragma once

#include <algorithm>
#include <cstring>
#include <string_view>
#include <tuple>
#include <type_traits>

#include "torch_c/tensor.h"

namespace crossvit {

// Which gradients a backward is asked for: the bools of Names, from a list of `given` bools in their order.
template <class Names>
struct Needs : Names {
  static constexpr std::size_t kGradients = sizeof(Names) / sizeof(bool);
  std::size_t given = 0;
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

// The first bools of an owned list, and how many it has.
std::size_t take_bools(StableListHandle owned, bool* values, std::size_t count);

// An argument as it came. It becomes what it is converted to, which is done once; a tensor lives as long as this.
class Argument {
 public:
  explicit Argument(StableIValue value) : value_(value) {}
  Argument(const Argument&) = delete;

  template <class T>
    requires std::is_arithmetic_v<T>
  operator T() const {
    return plain<T>(value_);
  }
  operator const Tensor&() { return tensor_.emplace(plain<AtenTensorHandle>(value_)); }
  operator const OptionalTensor&() {
    if (auto* given = plain<StableIValue*>(value_)) {
      tensor_.emplace(plain<AtenTensorHandle>(*given));
      delete given;
      if (!tensor_->defined()) tensor_.reset();
    }
    return tensor_;
  }
  template <class Names>
  operator Needs<Names>() const {
    bool values[Needs<Names>::kGradients] = {};
    Needs<Names> needs;
    needs.given = take_bools(plain<StableListHandle>(value_), values, std::size(values));
    std::memcpy(static_cast<Names*>(&needs), values, sizeof(values));
    return needs;
  }
  operator std::string() const;

 private:
  StableIValue value_;
  OptionalTensor tensor_;
};

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

void expect_count(std::uint64_t expected, std::uint64_t came);

// A function of plain arguments.
template <auto function, class Result, class... Parameters>
void call(Result (*)(Parameters...), StableIValue* stack, std::uint64_t came) {
  expect_count(sizeof...(Parameters), came);
  [&]<std::size_t... i>(std::index_sequence<i...>) {
    if constexpr (std::is_void_v<Result>) {
      function(Argument(stack[i])...);
    } else {
      give_all(stack, function(Argument(stack[i])...));
    }
  }(std::index_sequence_for<Parameters...>());
}

// How many arguments a schema has, one at least.
consteval std::size_t arguments_of(std::string_view schema) {
  return 1 + std::ranges::count(schema.substr(0, schema.find(')')), ',');
}

template <class Op, std::size_t... i>
consteval bool can_be_made(std::index_sequence<i...>) {
  return requires(Argument argument) { Op{(static_cast<void>(i), argument)...}; };
}

// An op's function takes a struct of the op's arguments, in the order of its schema, and what its device adds to them. It is
// called when check(), where the struct has it, has looked at them.
template <auto function, class Result, class Op, class... Added>
  requires requires { Op::schema; }
void call(Result (*)(const Op&, Added...), StableIValue* stack, std::uint64_t came) {
  constexpr std::size_t count = arguments_of(Op::schema);
  static_assert(!can_be_made<Op>(std::make_index_sequence<count + 1>()), "the schema has less than the struct");
  expect_count(count + sizeof...(Added), came);
  [&]<std::size_t... i>(std::index_sequence<i...>) {
    Argument arguments[] = {Argument(stack[i])...};
    const Op op{arguments[i]...};
    if constexpr (requires { op.check(); }) op.check();
    give_all(stack, function(op, plain<Added>(stack[count])...));
  }(std::make_index_sequence<count>());
}

template <auto function>
void boxed(StableIValue* stack, std::uint64_t arguments, std::uint64_t) {
  call<function>(function, stack, arguments);
}

}  // namespace boxing

// The ops of a namespace, for a dispatch key; they are gone when this is. `added` is what an op's schema has there behind the op's own
// arguments, where its function takes that.
class Library {
 public:
  Library(const char* space, const char* dispatch_key, const char* added = "");
  ~Library();
  Library(Library&& other) noexcept
      : space_(std::move(other.space_)),
        added_(other.added_),
        definitions_(std::exchange(other.definitions_, nullptr)),
        implementations_(std::exchange(other.implementations_, nullptr)) {}
  Library& operator=(Library&&) = delete;

  // A function whose arguments are of the types that the schema says.
  template <auto function>
  Library&& define(const std::string& schema) && {
    define(schema, &boxing::boxed<function>);
    return std::move(*this);
  }
  // An op.
  template <auto function>
  Library&& define() && {
    define_op<function>(function);
    return std::move(*this);
  }

 private:
  void define(const std::string& schema, void (*function)(StableIValue*, std::uint64_t, std::uint64_t));
  template <auto function, class Result, class Op, class... Added>
  void define_op(Result (*)(const Op&, Added...)) {
    std::string schema = Op::schema;
    if (sizeof...(Added)) schema.insert(schema.find(") ->"), added_);
    define(schema, &boxing::boxed<function>);
  }

  std::string space_;
  const char* added_;
  TorchLibraryHandle definitions_ = nullptr, implementations_ = nullptr;
};

}  // namespace crossvit
