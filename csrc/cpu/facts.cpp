// What the package asks about the library, which is of no tensor.
#include "instruction_sets.h"
#include "torch_c/op.h"

namespace crossvit {

namespace {

std::string compiler() { return __VERSION__; }

// Those compiled in, separated by spaces.
std::string built_instruction_sets() {
  std::string names;
  for (const auto& set : instruction_sets()) names += (names.empty() ? "" : " ") + std::string(set.kernels->name);
  return names;
}

const Library facts = Library("crossvit_kernels_cpu", "CompositeExplicitAutograd")
                          .define<compiler>("compiler() -> str")
                          .define<built_instruction_sets>("instruction_sets() -> str")
                          .define<instruction_set>("instruction_set() -> str")
                          .define<set_instruction_set>("set_instruction_set(str name) -> ()")
                          .define<fill_empty_with_nan>("fill_empty_with_nan(bool fill) -> ()");

}  // namespace

}  // namespace crossvit
