"""cls_fusion: one direction of a CrossViT stage's fusion, inference only.

    c   = W_f gelu(LayerNorm(cls)) + b_f                 cls (B, D_d) of this branch to the other's width D
    y   = c + W_o CA(c, patches) + b_o                   CA: cls_cross_attention over the other branch's patches (B, N,
    D) out = W_g gelu(LayerNorm(y)) + b_g                   (B, D_d), back in this branch

arXiv 2103.14899, eq. 5 to 7; `MultiScaleBlock.forward` in the authors' models/crossvit.py.
"""

from typing import Any

import torch
from torch import Tensor

from ..dispatch.register import Op
from . import _validate
from .cls_cross_attention import CUDA_ROW_BYTES, cls_cross_attention_reference
from .cls_cross_attention import _flops as attention_flops
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


def _shapes(cls: Tensor, patches: Tensor, *rest: Any) -> tuple[Any, ...]:
    _validate.tensor("cls", cls, "(B, D_d)")
    _validate.tensor("patches", patches, "(B, N, D)")
    batch, _, width = patches.shape
    _validate.heads(rest[-2], width, "patches' width")
    return _shapes_of(batch, patches.shape, cls.shape[1:], (width,))


def _shapes_of(batch: int, patches: Any, own: Any, other: Any) -> tuple[Any, ...]:
    """Of all tensors in their order, where this branch is `own` wide and the other `other`."""
    way_there, square = (*other, *own), other * 2
    attention = (other, other, *((square, other) * 4))
    return (batch, *own), patches, own, own, way_there, other, *attention, other, other, (*own, *other), own


def _results(cls: Tensor, *rest: Any) -> tuple[Any, ...]:
    revert_weight = rest[17]
    return ((cls.shape, revert_weight.dtype),)


def _flops(backend: str, cls: Tensor, patches: Tensor, *rest: Any) -> int:
    (batch, own_width), (_, _, width) = cls.shape, patches.shape
    return attention_flops(
        backend, cls.new_empty((batch, width)), patches, *rest[4:12], *rest[-2:]
    ) + 2 * batch * width * (2 * own_width + width)


def _fits_cuda(cls: Tensor, patches: Tensor, *rest: Any) -> bool:
    if patches.dim() != 3 or cls.dim() != 2:
        return True  # they say so
    size = max(cls.element_size(), patches.element_size(), rest[2].element_size())
    return max(cls.shape[1], patches.shape[2]) * size <= CUDA_ROW_BYTES


_op = Op(
    "cls_fusion",
    "Tensor cls, Tensor patches, Tensor proj_norm_weight, Tensor? proj_norm_bias, Tensor proj_weight, "
    "Tensor? proj_bias, Tensor norm_weight, Tensor? norm_bias, Tensor q_weight, Tensor? q_bias, Tensor k_weight, "
    "Tensor? k_bias, Tensor v_weight, Tensor? v_bias, Tensor out_weight, Tensor? out_bias, "
    "Tensor revert_norm_weight, Tensor? revert_norm_bias, Tensor revert_weight, Tensor? revert_bias, "
    "int num_heads, float eps",
    reference=cls_fusion_reference,
    shapes=_shapes,
    results=_results,
    flops=_flops,
    matrices=[f"{name}_{part}" for name in ("proj", "q", "k", "v", "out", "revert") for part in ("weight", "bias")],
    activations=("cls", "patches"),
    fits={"cuda": _fits_cuda},
)

_BEHIND = (*range(8, 16), 18, 19)  # the weights and biases of what is behind the projection


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
        cls: (B, D_d), this branch's CLS token; patches: (B, N, D), the other branch's; floating point, any strides; of
            two dtypes the reference serves them.
        proj_norm_weight, proj_norm_bias: (D_d,); proj_weight, proj_bias: (D, D_d), (D,): LayerNorm, gelu, Linear to the
            other width.
        norm_weight, norm_bias: (D,); q_, k_ and v_weight, _bias: (D, D), (D,): the attention's, see
            `cls_cross_attention`.
        out_weight, out_bias: (D, D), (D,): the attention's output projection.
        revert_norm_weight, revert_norm_bias: (D,); revert_weight, revert_bias: (D_d, D), (D_d,): LayerNorm, gelu,
            Linear back. Every LayerNorm's parameters may be float32 beside 16 bits.
        num_heads: a divisor of D.
        eps: added to the variance by all three LayerNorms.
        kernels: the backend, see `crossvit_kernels.backends`.
        Any bias may be None.

    Returns:
        (B, D_d), the CLS token after fusion, in the inputs' dtype; under autocast in autocast's.

    Raises:
        RuntimeError: a gradient would be needed (compose layer_norm_linear, cls_cross_attention and linear_residual for
            training), or the backend asked for is not there.
        TypeError, ValueError: an argument's type, dtype, shape, device or value is wrong.
    """
    _validate.tensor("patches", patches, "(B, N, D)")
    _validate.tensor("cls", cls, "(B, D_d)")
    batch, _, width = patches.shape
    own_width = cls.shape[-1]
    _validate.positive("the smaller width", min(width, own_width))
    inputs: tuple[Any, ...] = (
        cls,
        patches,
        proj_norm_weight,
        proj_norm_bias,
        proj_weight,
        proj_bias,
        norm_weight,
        norm_bias,
        q_weight,
        q_bias,
        k_weight,
        k_bias,
        v_weight,
        v_bias,
        out_weight,
        out_bias,
        revert_norm_weight,
        revert_norm_bias,
        revert_weight,
        revert_bias,
        num_heads,
        eps,
    )
    shapes = _shapes_of(batch, patches.shape, (own_width,), (width,))
    # A projection computes in the dtype of its cls, what follows in the one to which that and the patches' promote.
    _validate.beside("cls", cls, shapes[0], "patches", patches, any_dtype=True)
    mixed = cls.dtype is not patches.dtype and not _validate.autocast(patches)
    met = patches.new_empty(0, dtype=torch.promote_types(cls.dtype, patches.dtype)) if mixed else patches
    names = _op.inputs
    _validate.norm(names[2], proj_norm_weight, names[3], proj_norm_bias, shapes[2], "cls", cls)
    _validate.beside(names[4], proj_weight, shapes[4], "cls", cls)
    if proj_bias is not None:
        _validate.beside(names[5], proj_bias, shapes[5], "cls", cls)
    _validate.norm(names[6], norm_weight, names[7], norm_bias, shapes[6], "patches", met)
    _validate.norm(names[16], revert_norm_weight, names[17], revert_norm_bias, shapes[16], "patches", met)
    for i in _BEHIND:
        if (value := inputs[i]) is not None or not i % 2:
            _validate.beside(names[i], value, shapes[i], "patches", met)
    _validate.heads(num_heads, width, "patches' width")
    _validate.epsilon(eps)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        raise RuntimeError(
            "cls_fusion is for inference: call it under torch.no_grad(), or compose the other ops for training"
        )
    if _op.needs_reference(kernels, patches, q_weight.dtype) or mixed:
        return cls_fusion_reference(*inputs)
    return _op(*inputs, kernels=kernels)
