"""timm's CrossViT: patch embedding, cross-attention and a stage's fusion; its blocks are vision_transformer.py's."""

from typing import Any

import torch
from timm.models.crossvit import CrossAttention, CrossAttentionBlock, CrossVit, MultiScaleBlock, PatchEmbed
from torch import Tensor, nn

from ..ops import bicubic_resize, cls_cross_attention, cls_fusion, layer_norm_linear, linear_residual, patch_embed
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


def wrong_projection(name: str, projection: Any) -> str | None:
    """Why `projection` is not Linear(gelu(LayerNorm(x)))."""
    why = wrong_type(name, projection, nn.Sequential)
    if why is None and len(projection) != 3:
        why = f"{name} has {len(projection)} steps"
    return (
        why
        or wrong_norm(f"{name}.0", projection[0])
        or wrong_gelu(f"{name}.1", projection[1])
        or wrong_linear((f"{name}.2", projection[2]))
    )


def wrong_cross_attention(attn: Any) -> str | None:
    """Why `attn` is not the cross-attention that the op computes."""
    return (
        wrong_type("attn", attn, CrossAttention)
        or wrong_linear(*((f"attn.{n}", getattr(attn, n)) for n in ("wq", "wk", "wv", "proj")))
        or wrong_drop(("attn.attn_drop", attn.attn_drop), ("attn.proj_drop", attn.proj_drop))
        or (None if attn.scale == (attn.wq.out_features // attn.num_heads) ** -0.5 else "attn.scale is not 1 / sqrt(d)")
    )


def attention_weights(block: Any) -> tuple[Any, ...]:
    """The op's arguments norm_weight to v_bias."""
    attn = block.attn
    return *affine(block.norm1), *affine(attn.wq), *affine(attn.wk), *affine(attn.wv)


class FusedCrossAttentionBlock(Swap, CrossAttentionBlock):
    """timm.models.crossvit.CrossAttentionBlock: x (B, 1 + N, D) -> (B, 1, D)."""

    def refusal(self: Any) -> str | None:
        return (
            disturbance(self)
            or wrong_norm("norm1", self.norm1)
            or wrong_cross_attention(self.attn)
            or wrong_drop(("drop_path", self.drop_path))
        )

    def fusable(self: Any) -> bool:
        """Whether the ops can take the place of `forward` now."""
        return self.ready() and not drops(self.attn.attn_drop, self.attn.proj_drop)

    def attend(self: Any, cls: Tensor, patches: Tensor) -> Tensor:
        """cls (B, D) and patches (B, N, D) -> (B, D); only where `fusable`."""
        attn, kernels = self.attn, self._crossvit_kernels
        weights: Any = (*attention_weights(self), attn.num_heads, self.norm1.eps)
        context = cls_cross_attention(cls, patches, *weights, kernels=kernels)
        return linear_residual(context, *affine(attn.proj), cls, scale=path_scale(cls, self.drop_path), kernels=kernels)

    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.fusable():
            return super().forward(x)
        return self.attend(x[:, 0], x[:, 1:])[:, None]


class FusedMultiScaleBlock(Swap, MultiScaleBlock):
    """timm.models.crossvit.MultiScaleBlock: the tokens of every branch, (B, 1 + N_b, D_b) each, one stage further."""

    replaced = ("projs", "fusion", "revert_projs")

    def refusal(self: Any) -> str | None:
        why = disturbance(self, FusedMultiScaleBlock.replaced)
        for i in range(len(self.projs)):
            why = (
                why
                or wrong_projection(f"projs.{i}", self.projs[i])
                or wrong_projection(f"revert_projs.{i}", self.revert_projs[i])
            )
            layer = self.fusion[i]
            if type(layer) is nn.Sequential:  # more than one meets the CLS alone, which timm's own forward does
                why = why or (f"fusion.{i} has {len(layer)} layers" if len(layer) != 1 else None)
                layer = layer[0] if len(layer) else None
            why = why or wrong_type(f"fusion.{i}", layer, CrossAttentionBlock, FusedCrossAttentionBlock)
        return why or (None if self.blocks is not None else "it has no blocks")

    def forward(self: Any, x: list[Tensor]) -> list[Tensor]:
        layers = [layer[0] if type(layer) is nn.Sequential and len(layer) else layer for layer in self.fusion]
        if not self.ready() or not all(type(layer) is FusedCrossAttentionBlock and layer.fusable() for layer in layers):
            return super().forward(x)
        tokens = [block(branch) for block, branch in zip(self.blocks, x)]
        fused = []
        for i, (own, layer) in enumerate(zip(tokens, layers)):
            cls = self._direction(own[:, 0], tokens[(i + 1) % len(tokens)][:, 1:], i, layer)
            fused.append(torch.cat((cls[:, None], own[:, 1:]), dim=1))
        return fused

    def _direction(self: Any, cls: Tensor, patches: Tensor, i: int, layer: Any) -> Tensor:
        """The CLS (B, D_i) of branch i, which has looked at the patches of the next."""
        (norm, _, linear), (back_norm, _, back) = self.projs[i], self.revert_projs[i]
        kernels = self._crossvit_kernels
        same_eps = norm.eps == layer.norm1.eps == back_norm.eps
        if same_eps and not torch.is_grad_enabled() and not drops(layer.drop_path):
            weights: Any = (*affine(norm), *affine(linear), *attention_weights(layer), *affine(layer.attn.proj))
            heads = layer.attn.num_heads
            weights = (*weights, *affine(back_norm), *affine(back), heads, norm.eps)
            return cls_fusion(cls, patches, *weights, kernels=kernels)
        c = layer_norm_linear(cls, *affine(norm), *affine(linear), norm.eps, pre_activation="gelu", kernels=kernels)
        y = layer.attend(c, patches)
        return layer_norm_linear(
            y, *affine(back_norm), *affine(back), back_norm.eps, pre_activation="gelu", kernels=kernels
        )


class FusedCrossVit(Swap, CrossVit):
    """timm.models.crossvit.CrossVit with its patch embeddings of a single convolution in one op: resize, projection,
    CLS token and positions. A † stem is called as it is, on images that an op has resized."""

    replaced = ("patch_embed",)

    def refusal(self: Any) -> str | None:
        why = f"it has {self.num_branches} branches" if self.num_branches > 2 else None
        for i, embed in enumerate(self.patch_embed):
            why = (
                why
                or wrong_type(f"patch_embed.{i}", embed, PatchEmbed)
                or wrong_type(f"patch_embed.{i}.proj", embed.proj, nn.Conv2d, nn.Sequential)
            )
            proj = None if why else embed.proj
            if type(proj) is nn.Conv2d and (proj.kernel_size != proj.stride or proj.groups != 1):
                why = f"patch_embed.{i}.proj is another convolution"
        if why is None and self.crop_scale:
            why = "it crops instead of resizing"
        return why or disturbance(self, FusedCrossVit.replaced)

    def _embed(self: Any, x: Tensor) -> list[Tensor]:
        if not self.ready():
            return super()._embed(x)
        tokens, kernels = [], self._crossvit_kernels
        for i, embed in enumerate(self.patch_embed):
            size = self.img_size_scaled[i]
            cls_token, positions = (self.cls_token_1, self.pos_embed_1) if i else (self.cls_token_0, self.pos_embed_0)
            if type(embed.proj) is nn.Sequential:
                y = embed(bicubic_resize(x, size, kernels=kernels))
                y = torch.cat((cls_token.expand(y.shape[0], -1, -1), y), dim=1) + positions
            else:
                y = patch_embed(x, *affine(embed.proj), cls_token, positions, image_size=size, kernels=kernels)
            tokens.append(self.pos_drop(y))
        return tokens
