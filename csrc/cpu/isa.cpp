// The kernels for one instruction set: setup.py compiles this file once per set, with CROSSVIT_ISA naming it.
#include "attention.h"
#include "attention_grad.h"
#include "grad.h"
#include "heads.h"
#include "mlp.h"
#include "patch.h"
#include "token_gradient.h"
#include "token_pass.h"
#include "weight_grad.h"

#define CROSSVIT_STRING_(x) #x
#define CROSSVIT_STRING(x) CROSSVIT_STRING_(x)

namespace crossvit::CROSSVIT_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    .name = CROSSVIT_STRING(CROSSVIT_ISA),
    .dot_bf16 = kDotBf16,
    .operand_bytes = operand_bytes,
    .linear = {linear_plan, linear_scratch, linear_run},
    .mlp = {mlp_plan, mlp_scratch, mlp_run},
    .linear_grad = {linear_grad_plan, linear_grad_scratch, linear_grad_run},
    .mlp_grad = {mlp_grad_plan, mlp_grad_scratch, mlp_grad_run},
    .weight_grad = {weight_grad_plan, weight_grad_scratch, weight_grad_run},
    .transpose = {transpose_plan, transpose_scratch, transpose_run},
    .attention = {attention_plan, attention_scratch, attention_run},
    .attention_grad = {attention_grad_plan, attention_grad_scratch, attention_grad_run},
    .resize = {resize_plan, resize_scratch, resize_run},
    .resize_grad = {resize_grad_plan, resize_grad_scratch, resize_grad_run},
    .patch_embed = {patch_embed_plan, patch_embed_scratch, patch_embed_run},
    .patch_rows = {patch_rows_plan, patch_rows_scratch, patch_rows_run},
    .patch_grad_images = {patch_grad_images_plan, patch_grad_images_scratch, patch_grad_images_run},
    .absorb = {absorb_plan, absorb_scratch, absorb_run},
    .project_heads = {project_heads_plan, project_heads_scratch, project_heads_run},
    .token_pass = {token_pass_plan, token_pass_scratch, token_pass_run},
    .join_splits = {join_splits_plan, join_splits_scratch, join_splits_run},
    .token_gradient = {token_gradient_plan, token_gradient_scratch, token_gradient_run},
};

}  // namespace crossvit::CROSSVIT_ISA
