"""CaiT (arXiv 2103.17239): class attention, which is cls_cross_attention, and the MLP of its other blocks."""

from typing import Any

import torch
from timm.models.cait import LayerScaleBlock, LayerScaleBlockClassAttn
from torch import Tensor

from .. import blocks
from ..blocks import Residual
from ..composition import KERNELS, Composition
from ..kinds import DROPOUT, LAYER_NORM, LINEAR, kind, plain
from ..watch import fuses, fuses_each
from . import DROP_PATH, Swap, drop_path_rate, drops, wrong_scale
from .vision_transformer import MLP, attention_drops


def wrong_class_attention(attn: Any) -> str | None:
    """Why `attn` does not scale its scores by 1 / sqrt(d)."""
    return wrong_scale(attn.scale, attn.q.out_features // attn.num_heads)


_MLP_PARTS = {"norm2": LAYER_NORM, **MLP, "drop_path": DROP_PATH}
MLP_HALF = Composition("MLP half", _MLP_PARTS, (LayerScaleBlock, "forward"))
CLASS_ENTRY = (LayerScaleBlockClassAttn, "forward")
CLASS_MLP_HALF = Composition("MLP half", _MLP_PARTS, CLASS_ENTRY)
CLASS_ATTENTION_HALF = Composition(
    "class attention",
    {
        "norm1": LAYER_NORM,
        "attn": kind("timm.models.cait:ClassAttn", wrong=wrong_class_attention, settings=("scale", "num_heads")),
        **{f"attn.{name}": LINEAR for name in ("q", "k", "v", "proj")},
        "attn.attn_drop": DROPOUT,
        "attn.proj_drop": DROPOUT,
        "drop_path": DROP_PATH,
    },
    CLASS_ENTRY,
)
CLASS_HALVES = (CLASS_ATTENTION_HALF, CLASS_MLP_HALF)


def _mlp_half(block: Any, x: Tensor, fused: bool, kernels: str) -> Tensor:
    """x + drop_path(gamma_2 * mlp(norm2(x)))."""
    residual = Residual(block.gamma_2, *drop_path_rate(block.drop_path)) if fused else None
    out = blocks.mlp_half(x, block.norm2, block.mlp, residual, kernels)
    return x + block.drop_path(block.gamma_2 * block.mlp(block.norm2(x))) if out is None else out


class FusedLayerScaleBlock(Swap, LayerScaleBlock):
    """timm.models.cait.LayerScaleBlock: x (B, N, D) -> (B, N, D).

    Its attention mixes heads ("talking heads") and is called as it is.
    """

    _crossvit_entry, known = (LayerScaleBlock, "forward"), (MLP_HALF,)

    def forward(self: Any, x: Tensor) -> Tensor:
        kernels = getattr(self, KERNELS, None)  # None: restored a moment ago
        if kernels is None or not plain(x) or not fuses(self, MLP_HALF) or drops(self.mlp.drop1, self.mlp.drop2):
            return LayerScaleBlock.forward(self, x)
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
        return _mlp_half(self, x, True, kernels)


class FusedLayerScaleBlockClassAttn(Swap, LayerScaleBlockClassAttn):
    """timm.models.cait.LayerScaleBlockClassAttn: patches (B, N, D), CLS (B, 1, D) -> CLS (B, 1, D)."""

    _crossvit_entry, known = CLASS_ENTRY, CLASS_HALVES

    def forward(self: Any, x: Tensor, x_cls: Tensor) -> Tensor:
        kernels: Any = getattr(self, KERNELS, None)  # None: restored a moment ago
        known = kernels is not None and plain(x, x_cls)
        attention, mlp = fuses_each(self, CLASS_HALVES) if known else (False, False)
        attention = attention and not attention_drops(self.attn)
        mlp = mlp and not drops(self.mlp.drop1, self.mlp.drop2)
        if not (attention or mlp):
            return LayerScaleBlockClassAttn.forward(self, x, x_cls)
        out: Tensor | None = None
        if attention:
            attn, residual = self.attn, Residual(self.gamma_1, *drop_path_rate(self.drop_path))
            linears = (attn.q, attn.k, attn.v, attn.proj)
            out = blocks.class_attention(x_cls[:, 0], x, self.norm1, linears, attn.num_heads, residual, kernels)
        if out is None:
            x_cls = x_cls + self.drop_path(self.gamma_1 * self.attn(self.norm1(torch.cat((x_cls, x), dim=1))))
        else:
            x_cls = out[:, None]
        return _mlp_half(self, x_cls, mlp, kernels)
