"""Fused kernels for the parts of a vision transformer that PyTorch does badly, each behind one function and one flag,
`kernels=`."""

from . import backends
from .accelerate import accelerate, acceleration, restore
from .graphs import graphed
from .ops import (
    bicubic_resize,
    cls_cross_attention,
    cls_fusion,
    layer_norm_linear,
    layer_norm_mlp,
    linear_residual,
    patch_embed,
    self_attention,
)
from .version import VERSION

__all__ = [
    "accelerate",
    "acceleration",
    "backends",
    "bicubic_resize",
    "cls_cross_attention",
    "cls_fusion",
    "graphed",
    "layer_norm_linear",
    "layer_norm_mlp",
    "linear_residual",
    "patch_embed",
    "restore",
    "self_attention",
]
__version__ = VERSION
