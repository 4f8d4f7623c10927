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
#define CROSSVIT_KERNEL(name) .name = kernel_of<name##_run>(name##_plan, name##_run)

namespace crossvit::CROSSVIT_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    .name = CROSSVIT_STRING(CROSSVIT_ISA),
    .dot_bf16 = kDotBf16,
    .operand_bytes = operand_bytes,
    CROSSVIT_KERNEL(linear),
    CROSSVIT_KERNEL(mlp),
    CROSSVIT_KERNEL(linear_grad),
    CROSSVIT_KERNEL(mlp_grad),
    CROSSVIT_KERNEL(weight_grad),
    CROSSVIT_KERNEL(transpose),
    CROSSVIT_KERNEL(attention),
    CROSSVIT_KERNEL(attention_grad),
    CROSSVIT_KERNEL(resize),
    CROSSVIT_KERNEL(resize_grad),
    CROSSVIT_KERNEL(patch_embed),
    CROSSVIT_KERNEL(patch_rows),
    CROSSVIT_KERNEL(patch_grad_images),
    CROSSVIT_KERNEL(absorb),
    CROSSVIT_KERNEL(project_heads),
    CROSSVIT_KERNEL(token_pass),
    CROSSVIT_KERNEL(join_splits),
    CROSSVIT_KERNEL(token_gradient),
};

}  // namespace crossvit::CROSSVIT_ISA
