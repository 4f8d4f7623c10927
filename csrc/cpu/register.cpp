// Hands the C++ implementations to the dispatcher as the ops of the namespace crossvit_kernels_cpu. The ops that users call are
// registered from Python, in crossvit_kernels/ops.
#include "instruction_sets.h"
#include "ops.h"
#include "schemas.h"

namespace crossvit {

namespace {

std::string compiler() { return __VERSION__; }

// Those compiled in, separated by spaces.
std::string built_instruction_sets() {
  std::string names;
  for (const auto& set : instruction_sets()) names += (names.empty() ? "" : " ") + std::string(set.kernels->name);
  return names;
}

constexpr const char* kSpace = "crossvit_kernels_cpu";

// What the package asks about the library, which is of no tensor.
const Library facts = Library(kSpace, "CompositeExplicitAutograd")
                          .define<compiler>("compiler() -> str")
                          .define<built_instruction_sets>("instruction_sets() -> str")
                          .define<instruction_set>("instruction_set() -> str")
                          .define<set_instruction_set>("set_instruction_set(str name) -> ()")
                          .define<fill_empty_with_nan>("fill_empty_with_nan(bool fill) -> ()");

const Library kernels = Library(kSpace, "CPU")
                            .define<layer_norm_linear>(schema::layer_norm_linear.cpu())
                            .define<layer_norm_linear_backward>(schema::layer_norm_linear_backward.cpu())
                            .define<linear_residual>(schema::linear_residual.cpu())
                            .define<linear_residual_backward>(schema::linear_residual_backward.cpu())
                            .define<layer_norm_mlp>(schema::layer_norm_mlp.cpu())
                            .define<layer_norm_mlp_backward>(schema::layer_norm_mlp_backward.cpu())
                            .define<cls_cross_attention>(schema::cls_cross_attention.cpu())
                            .define<cls_cross_attention_backward>(schema::cls_cross_attention_backward.cpu())
                            .define<cls_fusion>(schema::cls_fusion.cpu())
                            .define<transformer_block>(schema::transformer_block)
                            .define<self_attention>(schema::self_attention)
                            .define<self_attention_backward>(schema::self_attention_backward)
                            .define<bicubic_resize>(schema::bicubic_resize)
                            .define<bicubic_resize_backward>(schema::bicubic_resize_backward)
                            .define<patch_embed>(schema::patch_embed.cpu())
                            .define<patch_embed_backward>(schema::patch_embed_backward.cpu());

}  // namespace

}  // namespace crossvit
