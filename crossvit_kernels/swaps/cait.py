"""timm's CaiT (arXiv 2103.17239): class attention, which is cls_cross_attention, and the MLP of its other blocks."""

from typing import Any

from timm.models.cait import ClassAttn, LayerScaleBlock, LayerScaleBlockClassAttn
from torch import Tensor

from ..ops import cls_cross_attention, layer_norm_mlp, linear_residual
from . import Swap, affine, disturbance, drops, wrong_drop, wrong_linear, wrong_norm, wrong_type
from .vision_transformer import wrong_mlp


def _mlp(block: Any, x: Tensor, kernels: str) -> Tensor:
    """x + gamma_2 * mlp(norm2(x))."""
    norm, mlp = block.norm2, block.mlp
    weights = (*affine(norm), *affine(mlp.fc1), *affine(mlp.fc2))
    return layer_norm_mlp(x, *weights, norm.eps, scale=block.gamma_2, kernels=kernels)


class FusedLayerScaleBlock(Swap, LayerScaleBlock):
    """timm.models.cait.LayerScaleBlock: x (B, N, D) -> (B, N, D).

    Its attention mixes heads ("talking heads") and stays.
    """

    replaced = ("norm2", "mlp", "drop_path")

    def refusal(self: Any) -> str | None:
        return (
            disturbance(self, FusedLayerScaleBlock.replaced)
            or wrong_norm("norm2", self.norm2)
            or wrong_mlp(self.mlp)
            or wrong_drop(("drop_path", self.drop_path))
        )

    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.ready() or drops(self.drop_path, self.mlp.drop1, self.mlp.drop2):
            return super().forward(x)
        x = x + self.gamma_1 * self.attn(self.norm1(x))
        return _mlp(self, x, self._crossvit_kernels)


class FusedLayerScaleBlockClassAttn(Swap, LayerScaleBlockClassAttn):
    """timm.models.cait.LayerScaleBlockClassAttn: patches (B, N, D), CLS (B, 1, D) -> CLS (B, 1, D)."""

    def refusal(self: Any) -> str | None:
        attn = self.attn
        return (
            disturbance(self)
            or wrong_norm("norm1", self.norm1)
            or wrong_norm("norm2", self.norm2)
            or wrong_type("attn", attn, ClassAttn)
            or wrong_linear(*((f"attn.{n}", getattr(attn, n)) for n in ("q", "k", "v", "proj")))
            or wrong_drop(("attn.attn_drop", attn.attn_drop), ("attn.proj_drop", attn.proj_drop))
            or (None if attn.scale == (attn.q.out_features // attn.num_heads) ** -0.5 else "attn.scale is another")
            or wrong_mlp(self.mlp)
            or wrong_drop(("drop_path", self.drop_path))
        )

    def forward(self: Any, x: Tensor, x_cls: Tensor) -> Tensor:
        attn, mlp, norm, kernels = self.attn, self.mlp, self.norm1, self._crossvit_kernels
        if not self.ready() or drops(attn.attn_drop, attn.proj_drop, mlp.drop1, mlp.drop2, self.drop_path):
            return super().forward(x, x_cls)
        cls = x_cls[:, 0]
        weights = (*affine(norm), *affine(attn.q), *affine(attn.k), *affine(attn.v))
        context = cls_cross_attention(cls, x, *weights, attn.num_heads, norm.eps, kernels=kernels)
        cls = linear_residual(context, *affine(attn.proj), cls, scale=self.gamma_1, kernels=kernels)
        return _mlp(self, cls[:, None], kernels)
