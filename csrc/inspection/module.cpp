// _C: what tests and simulations ask about the CPU's kernels, without PyTorch. Source builds alone have it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/instruction_sets.h"

namespace py = pybind11;

namespace crossvit {

namespace {

py::dict build_info() {
  std::vector<std::string> sets;
  for (const auto& set : instruction_sets()) sets.emplace_back(set.kernels->name);
  py::dict info;
  info["compiler"] = __VERSION__;
  info["instruction_sets"] = sets;
  return info;
}

// Takes one of a call's sizes, which go by their names in kernels.h; each has to be given, and no other.
int64_t take(py::dict& sizes, const std::string& kernel, const char* name) {
  if (!sizes.contains(name)) throw py::type_error(kernel + ": the size " + name + " is missing");
  const auto value = py::cast<int64_t>(sizes.attr("pop")(name));
  if (value < 0) throw py::value_error(kernel + ": " + name + ": expected at least 0, got " + std::to_string(value));
  return value;
}

py::dict in_words(const Plan& plan) { return py::dict(py::arg("tasks") = plan.tasks); }
py::dict in_words(const ProductPlan& plan) {
  return py::dict(py::arg("tasks") = plan.tasks, py::arg("of_columns") = plan.of_columns,
                  py::arg("threads") = plan.threads);
}
py::dict in_words(const PanelPlan& plan) {
  return py::dict(py::arg("tasks") = plan.tasks, py::arg("threads") = plan.threads);
}
py::dict in_words(const SplitPlan& plan) {
  return py::dict(py::arg("tasks") = plan.tasks, py::arg("splits") = plan.splits);
}
py::dict in_words(const WeightGradPlan& plan) {
  return py::dict(py::arg("tasks") = plan.tasks, py::arg("out_chunk") = plan.out_chunk,
                  py::arg("in_chunk") = plan.in_chunk);
}

using Planner = std::function<py::dict(const Kernels&, const std::string& kernel, py::dict sizes, int64_t threads)>;

// A kernel whose plan depends on these sizes of its arguments alone.
template <class Args, class P, class... Members>
Planner planner(Kernel<Args, P> Kernels::* kernel, std::vector<const char*> names, Members... members) {
  return [=](const Kernels& kernels, const std::string& called, py::dict sizes, int64_t threads) {
    Args args{};
    std::size_t i = 0;
    ((args.*members = take(sizes, called, names[i++])), ...);
    for (const auto& [name, size] : sizes)
      throw py::type_error(called + ": there is no size " + py::cast<std::string>(name));
    return in_words((kernels.*kernel).plan(args, threads));
  };
}

const std::map<std::string, Planner>& planners() {
  using K = Kernels;
  static const std::map<std::string, Planner> all{
      {"linear", planner(&K::linear, {"rows", "in_features", "out_features"}, &LinearArgs::rows, &LinearArgs::in,
                         &LinearArgs::out_features)},
      {"mlp", planner(&K::mlp, {"rows", "width", "hidden"}, &MlpArgs::rows, &MlpArgs::width, &MlpArgs::hidden)},
      {"linear_grad", planner(&K::linear_grad, {"rows", "in_features", "out_features"}, &LinearGradArgs::rows,
                              &LinearGradArgs::in, &LinearGradArgs::out_features)},
      {"mlp_grad", planner(&K::mlp_grad, {"rows", "width", "hidden"}, &MlpGradArgs::rows, &MlpGradArgs::width,
                           &MlpGradArgs::hidden)},
      {"weight_grad", planner(&K::weight_grad, {"rows", "out_features", "in_features"}, &WeightGradArgs::rows,
                              &WeightGradArgs::out, &WeightGradArgs::in)},
      {"transpose", planner(&K::transpose, {"rows", "columns"}, &TransposeArgs::rows, &TransposeArgs::columns)},
      {"attention", planner(&K::attention, {"batch", "tokens", "heads", "width"}, &AttentionArgs::batch,
                            &AttentionArgs::tokens, &AttentionArgs::heads, &AttentionArgs::width)},
      {"attention_grad", planner(&K::attention_grad, {"batch", "tokens", "heads", "width"}, &AttentionGradArgs::batch,
                                 &AttentionGradArgs::tokens, &AttentionGradArgs::heads, &AttentionGradArgs::width)},
      {"patch_embed",
       planner(&K::patch_embed, {"patches", "out_features"}, &PatchEmbedArgs::patches, &PatchEmbedArgs::out_features)},
      {"absorb", planner(&K::absorb, {"batch", "heads", "head_width", "width"}, &AbsorbArgs::batch, &AbsorbArgs::heads,
                         &AbsorbArgs::head_width, &AbsorbArgs::width)},
      {"project_heads", planner(&K::project_heads, {"batch", "heads", "head_width", "width"}, &ProjectHeadsArgs::batch,
                                &ProjectHeadsArgs::heads, &ProjectHeadsArgs::head_width, &ProjectHeadsArgs::width)},
      {"token_pass", planner(&K::token_pass, {"batch", "tokens", "width", "heads"}, &TokenPassArgs::batch,
                             &TokenPassArgs::tokens, &TokenPassArgs::width, &TokenPassArgs::heads)},
      {"token_gradient", planner(&K::token_gradient, {"batch", "tokens", "width", "heads"}, &TokenGradientArgs::batch,
                                 &TokenGradientArgs::tokens, &TokenGradientArgs::width, &TokenGradientArgs::heads)},
  };
  return all;
}

std::vector<std::string> kernels() {
  std::vector<std::string> names;
  for (const auto& [name, planner] : planners()) names.push_back(name);
  return names;
}

py::dict plan(const std::string& kernel, int64_t threads, const std::string& set, const py::kwargs& given) {
  const auto found = planners().find(kernel);
  if (found == planners().end()) throw py::value_error("kernel: expected one of kernels(), got '" + kernel + "'");
  if (threads < 1) throw py::value_error("threads: expected at least 1, got " + std::to_string(threads));
  for (const auto& candidate : instruction_sets()) {
    if (set != candidate.kernels->name) continue;
    // Its code is of that set, though it only counts.
    if (!candidate.supported) throw py::value_error("instruction set '" + set + "' is not supported by this CPU");
    return found->second(*candidate.kernels, kernel, given, threads);
  }
  throw py::value_error("instruction set '" + set + "' was not compiled in");
}

}  // namespace

}  // namespace crossvit

PYBIND11_MODULE(_C, m) {
  m.doc() = "What a source build was built of, and how its CPU kernels divide their work.";
  m.def("build_info", &crossvit::build_info, "compiler and instruction sets of the build");
  m.def("kernels", &crossvit::kernels, "the kernels whose plans are told");
  m.def(
      "plan", &crossvit::plan, py::arg("kernel"), py::arg("threads"), py::arg("instruction_set"),
      "How a call of a kernel is cut into tasks for so many threads, the sizes of the call being given by name: a dict "
      "with the number of tasks and what else the plan says. Raises ValueError or TypeError where an argument is "
      "wrong.");
}
