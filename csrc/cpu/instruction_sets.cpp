#include "instruction_sets.h"

#include <cstdlib>
#include <stdexcept>

#ifdef CROSSVIT_HAVE_NEON_BF16
#include <sys/auxv.h>
#endif

namespace crossvit {

// Of those that were compiled in.
namespace generic {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace neon_bf16 {
extern const Kernels kernels;
}

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> found{{&generic::kernels, true}};
#ifdef CROSSVIT_HAVE_AVX2
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    found.push_back({&avx2::kernels, has_avx2});
#endif
#ifdef CROSSVIT_HAVE_AVX512
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    found.push_back({&avx512::kernels, has_avx512 && has_avx2});
#endif
#ifdef CROSSVIT_HAVE_AVX512_BF16
    found.push_back({&avx512_bf16::kernels, has_avx512 && has_avx2 && __builtin_cpu_supports("avx512bf16")});
#endif
#ifdef CROSSVIT_HAVE_NEON_BF16
    constexpr unsigned long kBf16 = 1ul << 14;  // Linux's HWCAP2_BF16, which older headers lack
    found.push_back({&neon_bf16::kernels, (getauxval(AT_HWCAP2) & kBf16) != 0});
#endif
    return found;
  }();
  return sets;
}

namespace {

const Kernels& called(const std::string& name) {
  std::string known;
  for (const auto& set : instruction_sets()) {
    if (name == set.kernels->name) {
      if (!set.supported) throw std::invalid_argument("instruction set '" + name + "' is not supported by this CPU");
      return *set.kernels;
    }
    known += std::string(known.empty() ? "" : ", ") + set.kernels->name;
  }
  throw std::invalid_argument("instruction set '" + name + "' was not compiled in; there are: " + known);
}

struct Choice {
  const Kernels* kernels = nullptr;
  std::string refused;  // why it is not what the environment variable names

  Choice() {
    for (const auto& set : instruction_sets())
      if (set.supported) kernels = set.kernels;
    const char* forced = std::getenv("CROSSVIT_KERNELS_ISA");
    if (!forced || !*forced) return;
    try {
      kernels = &called(forced);
    } catch (const std::invalid_argument& error) {
      refused = error.what();
    }
  }
};

Choice choice;

}  // namespace

const Kernels& active() { return *choice.kernels; }

std::string instruction_set() {
  if (!choice.refused.empty()) throw std::invalid_argument(choice.refused);
  return choice.kernels->name;
}

void set_instruction_set(const std::string& name) {
  choice.kernels = &called(name);
  choice.refused.clear();
}

}  // namespace crossvit
