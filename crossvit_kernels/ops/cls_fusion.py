"""cls_fusion: one direction of a CrossViT stage's fusion, inference only.

    c   = W_f gelu(LayerNorm(cls)) + b_f                 cls (B, D_d) of this branch to the other's width D
    y   = c + W_o CA(c, patches) + b_o                   CA: cls_cross_attention over the other branch's patches (B, N, D)
    out = W_g gelu(LayerNorm(y)) + b_g                   (B, D_d), back in this branch

arXiv 2103.14899, eq. 5 to 7; `MultiScaleBlock.forward` in the authors' models/crossvit.py.
"""

from torch import Tensor

from .cls_cross_attention import cls_cross_attention_reference
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
    return cls_fusion_reference(
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
