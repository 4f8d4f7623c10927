#include "torch_c/op.h"

#include <stdexcept>

namespace crossvit {

// By this PyTorch's rules do arguments and results travel, whichever it was built with.
inline constexpr std::uint64_t kInterface = TORCH_TARGET_VERSION;

// Where PyTorch says that an op comes from.
inline constexpr const char* kFile = "csrc/torch_c/op.cpp";

namespace boxing {

std::size_t take_bools(StableListHandle owned, bool* values, std::size_t count) {
  std::size_t size = 0;
  AOTITorchError error = torch_list_size(owned, &size);
  for (std::size_t i = 0; i < std::min(size, count) && error == AOTI_TORCH_SUCCESS; i++) {
    StableIValue value = 0;
    error = torch_list_get_item(owned, i, &value);
    values[i] = plain<bool>(value);
  }
  torch_delete_list(owned);
  checked(error);
  return size;
}

Argument::operator std::string() const {
  const auto owned = plain<StringHandle>(value_);
  std::size_t size = 0;
  const char* data = nullptr;
  AOTITorchError error = torch_string_length(owned, &size);
  if (error == AOTI_TORCH_SUCCESS) error = torch_string_c_str(owned, &data);
  std::string result(data ? data : "", data ? size : 0);
  torch_delete_string(owned);
  checked(error);
  return result;
}

StableIValue give(std::vector<Tensor> results) {
  StableListHandle list = nullptr;
  checked(torch_new_list_reserve_size(results.size(), &list));
  for (Tensor& result : results) checked(torch_list_push_back(list, give(std::move(result))));
  return stable(list);
}

StableIValue give(const std::string& result) {
  StringHandle handle = nullptr;
  checked(torch_new_string_handle(result.data(), result.size(), &handle));
  return stable(handle);
}

void expect_count(std::uint64_t expected, std::uint64_t came) {
  if (expected == came) return;
  throw std::runtime_error("a function of " + std::to_string(expected) +
                           " arguments was registered under a schema of " + std::to_string(came));
}

}  // namespace boxing

Library::Library(const char* space, const char* dispatch_key, const char* added) : space_(space), added_(added) {
  checked(aoti_torch_library_init_fragment(space, kFile, __LINE__, &definitions_));
  checked(aoti_torch_library_init_impl(space, dispatch_key, kFile, __LINE__, &implementations_));
}

Library::~Library() {
  if (implementations_) aoti_torch_delete_library_object(implementations_);
  if (definitions_) aoti_torch_delete_library_object(definitions_);
}

void Library::define(const std::string& schema, void (*function)(StableIValue*, std::uint64_t, std::uint64_t)) {
  const std::string name = space_ + "::" + schema.substr(0, schema.find('('));
  checked(aoti_torch_library_def(definitions_, schema.c_str()));
  checked(torch_library_impl(implementations_, name.c_str(), function, kInterface));
}

}  // namespace crossvit
