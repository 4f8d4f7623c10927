"""timm's transformer block: ViT, DeiT and CrossViT's branches."""

from typing import Any

import torch
from timm.layers import Attention, LayerScale, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..nn import whole_block
from ..ops import layer_norm_linear, layer_norm_mlp, linear_residual, self_attention
from . import (
    Swap,
    affine,
    disturbance,
    drops,
    path_scale,
    wrong_drop,
    wrong_gelu,
    wrong_linear,
    wrong_norm,
    wrong_type,
)


def wrong_mlp(mlp: Any) -> str | None:
    """Why `mlp` is not Linear2(gelu(Linear1(x))) with dropouts."""
    return (
        wrong_type("mlp", mlp, Mlp)
        or wrong_linear(("mlp.fc1", mlp.fc1), ("mlp.fc2", mlp.fc2))
        or wrong_gelu("mlp.act", mlp.act)
        or wrong_type("mlp.norm", mlp.norm, nn.Identity)
        or wrong_drop(("mlp.drop1", mlp.drop1), ("mlp.drop2", mlp.drop2))
    )


def wrong_attention(attn: Any) -> str | None:
    """Why `attn` is not softmax(q k^T / sqrt(d)) v between the Linears qkv and proj."""
    return (
        wrong_type("attn", attn, Attention)
        or wrong_linear(("attn.qkv", attn.qkv), ("attn.proj", attn.proj))
        or wrong_type("attn.q_norm", attn.q_norm, nn.Identity)
        or wrong_type("attn.k_norm", attn.k_norm, nn.Identity)
        or wrong_type("attn.norm", attn.norm, nn.Identity)
        or ("attn has a gate" if getattr(attn, "gate", None) is not None else None)
        or ("attn.scale is not 1 / sqrt(d)" if attn.scale != attn.head_dim**-0.5 else None)
        or wrong_drop(("attn.attn_drop", attn.attn_drop), ("attn.proj_drop", attn.proj_drop))
    )


def wrong_scale(name: str, scale: Any) -> str | None:
    """Why `scale` is neither a LayerScale nor an identity."""
    return wrong_type(name, scale, nn.Identity, LayerScale)


def scale_of(x: Tensor, layer_scale: Any, drop_path: Any) -> Tensor | None:
    """The one factor of a residual branch: LayerScale's per channel (D,), the drop path's per sample (B, 1, 1), or
    None."""
    scale = path_scale(x, drop_path)
    return layer_scale.gamma if scale is None and type(layer_scale) is LayerScale else scale


class FusedBlock(Swap, Block):
    """timm.models.vision_transformer.Block: x (B, N, D) -> (B, N, D)."""

    def refusal(self: Any) -> str | None:
        return (
            disturbance(self)
            or wrong_norm("norm1", self.norm1)
            or wrong_norm("norm2", self.norm2)
            or wrong_attention(self.attn)
            or wrong_mlp(self.mlp)
            or wrong_scale("ls1", self.ls1)
            or wrong_scale("ls2", self.ls2)
            or wrong_drop(("drop_path1", self.drop_path1), ("drop_path2", self.drop_path2))
        )

    def _two_scales(self: Any) -> bool:
        # The ops take one factor: LayerScale's or the drop path's.
        return (type(self.ls1) is LayerScale and drops(self.drop_path1)) or (
            type(self.ls2) is LayerScale and drops(self.drop_path2)
        )

    def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        attn, mlp, norm1, norm2, kernels = self.attn, self.mlp, self.norm1, self.norm2, self._crossvit_kernels
        if (
            attn_mask is not None
            or is_causal
            or not self.ready()
            or drops(attn.attn_drop, attn.proj_drop, mlp.drop1, mlp.drop2)
            or self._two_scales()
        ):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        if not (self.training or torch.is_grad_enabled()):
            scales = [scale_of(x, self.ls1, self.drop_path1), scale_of(x, self.ls2, self.drop_path2)]
            if (out := whole_block(x, norm1, attn, scales[0], norm2, mlp, scales[1], kernels)) is not None:
                return out
        qkv = layer_norm_linear(x, *affine(norm1), *affine(attn.qkv), norm1.eps, kernels=kernels)
        heads = self_attention(qkv, attn.num_heads, kernels=kernels)
        x = linear_residual(heads, *affine(attn.proj), x, scale=scale_of(x, self.ls1, self.drop_path1), kernels=kernels)
        scale = scale_of(x, self.ls2, self.drop_path2)
        return layer_norm_mlp(
            x, *affine(norm2), *affine(mlp.fc1), *affine(mlp.fc2), norm2.eps, scale=scale, kernels=kernels
        )
