"""One module per op: what it computes, its reference in plain PyTorch, its registration with the dispatcher."""

from .bicubic_resize import bicubic_resize, bicubic_resize_reference
from .cls_cross_attention import cls_cross_attention, cls_cross_attention_reference
from .cls_fusion import cls_fusion, cls_fusion_reference
from .layer_norm_linear import layer_norm_linear, layer_norm_linear_reference
from .layer_norm_mlp import layer_norm_mlp, layer_norm_mlp_reference
from .linear_residual import linear_residual, linear_residual_reference
from .patch_embed import patch_embed, patch_embed_reference
from .self_attention import self_attention, self_attention_reference

__all__ = [
    "bicubic_resize",
    "bicubic_resize_reference",
    "cls_cross_attention",
    "cls_cross_attention_reference",
    "cls_fusion",
    "cls_fusion_reference",
    "layer_norm_linear",
    "layer_norm_linear_reference",
    "layer_norm_mlp",
    "layer_norm_mlp_reference",
    "linear_residual",
    "linear_residual_reference",
    "patch_embed",
    "patch_embed_reference",
    "self_attention",
    "self_attention_reference",
]
