"""cls_fusion: one direction of a CrossViT stage's fusion, inference only.

    c   = W_proj gelu(LayerNorm(cls)) + b_proj           cls (B, D_d) of this branch, c (B, D) of the other's width
    y   = c + W_out CA(c, patches) + b_out               patches (B, N, D) of the other branch
    out = W_revert gelu(LayerNorm(y)) + b_revert         out (B, D_d), back in this branch

CA is cls_cross_attention. These are equations 5 to 7 of arXiv 2103.14899 and `MultiScaleBlock.forward` in the authors'
models/crossvit.py.
"""

import torch
from torch import Tensor

from ..dispatch.call import call, needs_reference
from ..dispatch.register import register
from ..dispatch.spec import Argument, LinearParams, NormParams, OpSpec, Result, Shapes
from . import validate
from .cls_cross_attention import PARAMETERS as ATTENTION
from .cls_cross_attention import cls_cross_attention_reference, fits_cuda
from .cls_cross_attention import flops as attention_flops
from .cls_cross_attention import parameter_shapes as attention_shapes
from .layer_norm_linear import layer_norm_linear_reference
from .linear_residual import linear_residual_reference


def cls_fusion_reference(
    cls: Tensor,
    patches: Tensor,
    proj_norm_weight: Tensor,
    proj_norm_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    revert_norm_weight: Tensor,
    revert_norm_bias: Tensor | None,
    revert_weight: Tensor,
    revert_bias: Tensor | None,
    num_heads: int,
    eps: float = 1e-6,
) -> Tensor:
    """cls_fusion in plain PyTorch."""
    c = layer_norm_linear_reference(
        cls, proj_norm_weight, proj_norm_bias, proj_weight, proj_bias, eps, pre_activation="gelu"
    )
    attended = cls_cross_attention_reference(
        c, patches, norm_weight, norm_bias, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, num_heads, eps
    )
    y = linear_residual_reference(attended, out_weight, out_bias, c)
    return layer_norm_linear_reference(
        y, revert_norm_weight, revert_norm_bias, revert_weight, revert_bias, eps, pre_activation="gelu"
    )


_PROJ_NORM, _REVERT_NORM = NormParams.named("proj_norm"), NormParams.named("revert_norm")
_PROJ, _OUT, _REVERT = map(LinearParams.named, ("proj", "out", "revert"))


def _shapes(cls: Tensor, patches: Tensor, num_heads: int) -> Shapes:
    validate.tensor("cls", cls, "(B, D_d)")
    validate.tensor("patches", patches, "(B, N, D)")
    (batch, _, width), own_width = patches.shape, cls.shape[1]
    validate.heads(num_heads, width, "patches' width")
    return {
        "cls": (batch, own_width),
        "patches": patches.shape,
        **_PROJ_NORM.shapes(own_width),
        **_PROJ.shapes(width, own_width),
        **attention_shapes(width),
        **_OUT.shapes(width, width),
        **_REVERT_NORM.shapes(width),
        **_REVERT.shapes(own_width, width),
    }


def _results(cls: Tensor, revert_weight: Tensor) -> tuple[Result, ...]:
    return ((cls.shape, revert_weight.dtype),)


def _flops(backend: str, cls: Tensor, patches: Tensor, num_heads: int) -> int:
    (batch, own_width), (_, _, width) = cls.shape, patches.shape
    return attention_flops(backend, patches, num_heads) + 2 * batch * width * (2 * own_width + width)


_op = register(
    OpSpec(
        "cls_fusion",
        [
            Argument("cls", activation=True),
            Argument("patches", activation=True),
            _PROJ_NORM,
            _PROJ,
            *ATTENTION,
            _OUT,
            _REVERT_NORM,
            _REVERT,
            Argument("num_heads", "int"),
            Argument("eps", "float"),
        ],
        computes_in="proj_weight",
        reference=cls_fusion_reference,
        shapes=_shapes,
        results=_results,
        flops=_flops,
        fits={"cuda": fits_cuda},
    )
)


def cls_fusion(
    cls: Tensor,
    patches: Tensor,
    proj_norm_weight: Tensor,
    proj_norm_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    revert_norm_weight: Tensor,
    revert_norm_bias: Tensor | None,
    revert_weight: Tensor,
    revert_bias: Tensor | None,
    num_heads: int,
    eps: float = 1e-6,
    *,
    kernels: str = "auto",
) -> Tensor:
    """One direction of a stage's fusion; inference only.

    Args:
        cls: (B, D_d), this branch's CLS token, floating point, any strides.
        patches: (B, N, D), the other branch's, likewise; of two dtypes the reference serves them.
        proj_norm_weight, proj_norm_bias: (D_d,), the LayerNorm before the projection to the other width. Parameters of
            every LayerNorm may be float32 beside 16 bits, and any bias may be None.
        proj_weight, proj_bias: (D, D_d) and (D,), the Linear to the other width, behind a gelu.
        norm_weight, norm_bias: (D,), the attention's LayerNorm.
        q_weight, q_bias, k_weight, k_bias, v_weight, v_bias: (D, D) and (D,), see `cls_cross_attention`.
        out_weight, out_bias: (D, D) and (D,), the attention's output projection.
        revert_norm_weight, revert_norm_bias: (D,), the LayerNorm before the way back.
        revert_weight, revert_bias: (D_d, D) and (D_d,), the Linear back, behind a gelu.
        num_heads: a divisor of D.
        eps: added to the variance by all three LayerNorms.
        kernels: the backend, see `crossvit_kernels.backends`.

    Returns:
        (B, D_d), the CLS token after fusion, in the inputs' dtype; under autocast in autocast's.

    Raises:
        RuntimeError: a gradient would be needed (compose layer_norm_linear, cls_cross_attention and linear_residual for
            training), or the backend asked for is not there.
        TypeError, ValueError: an argument's type, dtype, shape, device or value is wrong.
    """
    validate.tensor("patches", patches, "(B, N, D)")
    validate.tensor("cls", cls, "(B, D_d)")
    batch, _, width = patches.shape
    own_width = cls.shape[-1]
    validate.positive("the smaller width", min(width, own_width))
    # A projection computes in the dtype of its cls, what follows in the one to which that and the patches' promote.
    validate.beside("cls", cls, (batch, own_width), "patches", patches, any_dtype=True)
    mixed = cls.dtype is not patches.dtype and not validate.autocast(patches)
    met = patches.new_empty(0, dtype=torch.promote_types(cls.dtype, patches.dtype)) if mixed else patches
    norm, linear, square = validate.norm, validate.linear, (width, width)
    norm("proj_norm_weight", proj_norm_weight, "proj_norm_bias", proj_norm_bias, (own_width,), "cls", cls)
    linear("proj_weight", proj_weight, "proj_bias", proj_bias, (width, own_width), "cls", cls)
    norm("norm_weight", norm_weight, "norm_bias", norm_bias, (width,), "patches", met)
    norm("revert_norm_weight", revert_norm_weight, "revert_norm_bias", revert_norm_bias, (width,), "patches", met)
    linear("q_weight", q_weight, "q_bias", q_bias, square, "patches", met)
    linear("k_weight", k_weight, "k_bias", k_bias, square, "patches", met)
    linear("v_weight", v_weight, "v_bias", v_bias, square, "patches", met)
    linear("out_weight", out_weight, "out_bias", out_bias, square, "patches", met)
    linear("revert_weight", revert_weight, "revert_bias", revert_bias, (own_width, width), "patches", met)
    validate.heads(num_heads, width, "patches' width")
    validate.epsilon(eps)
    projection = proj_norm_weight, proj_norm_bias, proj_weight, proj_bias
    attended = norm_weight, norm_bias, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, out_weight, out_bias
    reverted = revert_norm_weight, revert_norm_bias, revert_weight, revert_bias
    inputs = (cls, patches, *projection, *attended, *reverted, num_heads, eps)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        raise RuntimeError(
            "cls_fusion is for inference: call it under torch.no_grad(), or compose the other ops for training"
        )
    if needs_reference(_op, inputs, kernels, q_weight.dtype) or mixed:
        return cls_fusion_reference(*inputs)
    return call(_op, inputs, kernels)
