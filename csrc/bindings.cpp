// Hands the C++ implementations to the dispatcher (namespace crossvit_kernels_cpu) and tells Python what was built and what
// this CPU can do. The ops that users call are registered from Python, in crossvit_kernels/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/ops.h"
#include "schemas.h"

namespace crossvit {

namespace generic {
extern const Kernels kernels;
}
#ifdef CROSSVIT_HAVE_AVX2
namespace avx2 {
extern const Kernels kernels;
}
#endif
#ifdef CROSSVIT_HAVE_AVX512
namespace avx512 {
extern const Kernels kernels;
}
#endif
#ifdef CROSSVIT_HAVE_AVX512_BF16
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif

namespace {

struct InstructionSet {
  const Kernels* kernels;
  bool supported;  // by this CPU and its operating system
};

// From the least to the most.
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
    return found;
  }();
  return sets;
}

const Kernels* chosen = nullptr;

void set_instruction_set(const std::string& name) {
  std::string known;
  for (const auto& set : instruction_sets()) {
    if (name == set.kernels->name) {
      if (!set.supported) throw pybind11::value_error("instruction set '" + name + "' is not supported by this CPU");
      chosen = set.kernels;
      return;
    }
    known += std::string(known.empty() ? "" : ", ") + set.kernels->name;
  }
  throw pybind11::value_error("instruction set '" + name + "' was not compiled in; there are: " + known);
}

void choose_instruction_set() {
  if (const char* forced = std::getenv("CROSSVIT_KERNELS_ISA"); forced && *forced) return set_instruction_set(forced);
  for (const auto& set : instruction_sets())
    if (set.supported) chosen = set.kernels;
}

pybind11::dict build_info() {
  pybind11::dict info;
  std::vector<std::string> sets;
  for (const auto& set : instruction_sets()) sets.emplace_back(set.kernels->name);
  info["torch_version"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["instruction_sets"] = sets;
  return info;
}

}  // namespace

const Kernels& active() { return *chosen; }

}  // namespace crossvit

TORCH_LIBRARY(crossvit_kernels_cpu, m) {
  using namespace crossvit;
  const auto op = [&m](const std::string& schema, auto function) {
    m.def(schema.c_str(), torch::dispatch(c10::DispatchKey::CPU, function));
  };
  op(schema::layer_norm_linear, TORCH_FN(layer_norm_linear));
  op(schema::layer_norm_linear_backward.cpu(), TORCH_FN(layer_norm_linear_backward));
  op(schema::linear_residual, TORCH_FN(linear_residual));
  op(schema::linear_residual_backward.cpu(), TORCH_FN(linear_residual_backward));
  op(schema::layer_norm_mlp, TORCH_FN(layer_norm_mlp));
  op(schema::layer_norm_mlp_backward.cpu(), TORCH_FN(layer_norm_mlp_backward));
  op(schema::cls_cross_attention, TORCH_FN(cls_cross_attention));
  op(schema::cls_cross_attention_backward.cpu(), TORCH_FN(cls_cross_attention_backward));
  op(schema::cls_fusion, TORCH_FN(cls_fusion));
  op(schema::transformer_block, TORCH_FN(transformer_block));
  op(schema::self_attention, TORCH_FN(self_attention));
  op(schema::self_attention_backward, TORCH_FN(self_attention_backward));
  op(schema::bicubic_resize, TORCH_FN(bicubic_resize));
  op(schema::bicubic_resize_backward, TORCH_FN(bicubic_resize_backward));
  op(schema::patch_embed, TORCH_FN(patch_embed));
  op(schema::patch_embed_backward.cpu(), TORCH_FN(patch_embed_backward));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels of crossvit_kernels: what was built, and which instruction set runs.";
  crossvit::choose_instruction_set();
  m.def("build_info", &crossvit::build_info, "torch version, compiler and instruction sets of the build");
  m.def("cpu_instruction_set", [] { return std::string(crossvit::active().name); }, "the instruction set in force");
  m.def("set_instruction_set", &crossvit::set_instruction_set, pybind11::arg("name"),
        "Use another compiled instruction set; ValueError if it was not compiled in or this CPU lacks it.");
}
