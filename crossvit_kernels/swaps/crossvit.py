"""timm's CrossViT: patch embedding, cross-attention and a stage's fusion; its blocks are vision_transformer.py's."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.crossvit import CrossAttentionBlock, CrossVit, MultiScaleBlock, scale_image
from torch import Tensor, nn

from .. import blocks
from ..blocks import Residual
from ..composition import KERNELS, Composition, Family
from ..kinds import DROPOUT, GELU, LAYER_NORM, LINEAR, PATCH_CONVOLUTION, Kind, kind, plain
from ..ops import bicubic_resize
from ..prepared import again
from ..watch import fuses
from . import DROP_PATH, Swap, drop_path_rate, wrong_scale
from .vision_transformer import attention_drops


def wrong_cross_attention(attn: Any) -> str | None:
    """Why `attn` does not scale its scores by 1 / sqrt(d)."""
    return wrong_scale(attn.scale, attn.wq.out_features // attn.num_heads)


_ATTENTION: dict[str, Kind] = {
    "norm1": LAYER_NORM,
    "attn": kind("timm.models.crossvit:CrossAttention", wrong=wrong_cross_attention, settings=("scale", "num_heads")),
    **{f"attn.{name}": LINEAR for name in ("wq", "wk", "wv", "proj")},
    "attn.attn_drop": DROPOUT,
    "attn.proj_drop": DROPOUT,
    "drop_path": DROP_PATH,
}
_BLOCK_ENTRY = (CrossAttentionBlock, "forward")
CLASS_ATTENTION = Composition("class attention", _ATTENTION, _BLOCK_ENTRY)


def _attend(layer: Any, cls: Tensor, patches: Tensor, kernels: str) -> Tensor | None:
    """cls (B, D) and patches (B, N, D) -> (B, D); only where nothing stands against the layer's class attention."""
    attn, residual = layer.attn, Residual(None, *drop_path_rate(layer.drop_path))
    return blocks.class_attention(cls, patches, layer.norm1, _linears(attn), attn.num_heads, residual, kernels)


def _linears(attn: Any) -> tuple[Any, Any, Any, Any]:
    return attn.wq, attn.wk, attn.wv, attn.proj


class FusedCrossAttentionBlock(Swap, CrossAttentionBlock):
    """timm.models.crossvit.CrossAttentionBlock: x (B, 1 + N, D) -> (B, 1, D)."""

    _crossvit_entry, known = _BLOCK_ENTRY, (CLASS_ATTENTION,)

    def forward(self: Any, x: Tensor) -> Tensor:
        kernels = getattr(self, KERNELS, None)  # None: restored a moment ago
        if kernels is not None and plain(x) and fuses(self, CLASS_ATTENTION) and not attention_drops(self.attn):
            out = _attend(self, x[:, 0], x[:, 1:], kernels)
            if out is not None:
                return out[:, None]
        return CrossAttentionBlock.forward(self, x)


_STAGE_ENTRY = (MultiScaleBlock, "forward")
_LAYER = kind("timm.models.crossvit:CrossAttentionBlock", "crossvit_kernels.swaps.crossvit:FusedCrossAttentionBlock")


def _sequence(steps: int) -> Kind:
    """A Sequential of so many children."""

    def wrong(module: nn.Module) -> str | None:
        return None if len(module._modules) == steps else f"has {len(module._modules)} layers"

    return kind("torch.nn.modules.container:Sequential", wrong=wrong)


@Family
def projection(name: str, i: int) -> Composition:
    """LayerNorm, GELU, Linear: `projs.i` or `revert_projs.i`."""
    path = f"{name}.{i}"
    return Composition(
        "projections",
        {path: _sequence(3), f"{path}.0": LAYER_NORM, f"{path}.1": GELU, f"{path}.2": LINEAR},
        _STAGE_ENTRY,
    )


@Family
def attention(i: int, nested: bool) -> Composition:
    """The cross-attention of branch i.

    nested: it is the only layer of a Sequential. Of several layers all but the first meet the CLS alone, which timm's
    own forward does.
    """
    path = f"fusion.{i}.0" if nested else f"fusion.{i}"
    parts: dict[str, Kind] = {f"fusion.{i}": _sequence(1)} if nested else {}
    parts |= {path: _LAYER} | {f"{path}.{name}": expected for name, expected in _ATTENTION.items()}
    return Composition("cross-attention", parts, _STAGE_ENTRY)


@Family
def direction(i: int, nested: bool) -> Composition:
    """The whole direction: to the other width, the attention, and back."""
    steps = projection.make("projs", i), attention.make(i, nested), projection.make("revert_projs", i)
    parts = {path: expected for step in steps for path, expected in step.parts.items()}
    return Composition("fusion", parts, _STAGE_ENTRY)


class FusedMultiScaleBlock(Swap, MultiScaleBlock):
    """timm.models.crossvit.MultiScaleBlock: the tokens of every branch, (B, 1 + N_b, D_b) each, one stage further."""

    _crossvit_entry = _STAGE_ENTRY

    @staticmethod
    def unusual(module: Any) -> str | None:
        return None if module.blocks is not None else "it has no blocks"

    @classmethod
    def compositions(cls, module: Any) -> Sequence[Composition]:
        found = []
        for i in range(len(module.projs)):
            nested = isinstance(module.fusion[i], nn.Sequential)
            found += [projection("projs", i), attention(i, nested), projection("revert_projs", i)]
        return found

    def forward(self: Any, x: list[Tensor]) -> list[Tensor]:
        kernels = getattr(self, KERNELS, None)  # None: restored a moment ago
        if kernels is None or self.blocks is None or not plain(*x) or not fuses(self, _STAGE):
            return MultiScaleBlock.forward(self, x)
        tokens = [block(branch) for block, branch in zip(self.blocks, x)]
        fused = []
        for i, own in enumerate(tokens):
            cls = _direction(self, i, own[:, 0], tokens[(i + 1) % len(tokens)][:, 1:], kernels)
            fused.append(torch.cat((cls[:, None], own[:, 1:]), dim=1))
        return fused


_STAGE = Composition("stage", {}, _STAGE_ENTRY)


def _direction(stage: Any, i: int, cls: Tensor, patches: Tensor, kernels: str) -> Tensor:
    """The CLS (B, D_i) of branch i, which has looked at the patches of the next."""
    found: Tensor | None = again(stage, i, cls, patches)
    if found is not None:
        return found
    layer = stage.fusion[i]
    nested = isinstance(layer, nn.Sequential)
    if nested:
        layer = layer[0] if len(layer) else None
    whole = fuses(stage, direction, i, nested)
    attends = (whole or fuses(stage, attention, i, nested)) and not attention_drops(layer.attn)
    if whole and attends and drop_path_rate(layer.drop_path)[0] == 0:
        (norm, _, linear), (back_norm, _, back) = stage.projs[i], stage.revert_projs[i]
        attn, place = layer.attn, (stage, i, (direction(i, nested),))
        steps = (norm, linear), layer.norm1, _linears(attn), attn, (back_norm, back)
        out = blocks.fusion_direction(cls, patches, *steps, kernels, place)
        if out is not None:
            return out
    c = _project(stage, "projs", i, cls, whole, kernels)
    y = _attend(layer, c, patches, kernels) if attends else None
    if y is None:
        y = stage.fusion[i](torch.cat((c[:, None], patches), dim=1))[:, 0]
    return _project(stage, "revert_projs", i, y, whole, kernels)


def _project(stage: Any, name: str, i: int, x: Tensor, fused: bool, kernels: str) -> Tensor:
    """Linear(gelu(LayerNorm(x))) of `projs.i` or `revert_projs.i`, x (B, D) -> (B, E)."""
    module = getattr(stage, name)[i]
    out = None
    if fused or fuses(stage, projection, name, i):
        out = blocks.projection(x, module[0], module[2], kernels, pre_activation="gelu")
    return module(x[:, None])[:, 0] if out is None else out


_EMBED_ENTRY = (CrossVit, "_embed")
_PATCH_EMBED = kind("timm.models.crossvit:PatchEmbed")


@Family
def patches(i: int) -> Composition:
    """The patch embedding of branch i, a single convolution."""
    return Composition(
        "patch embedding", {f"patch_embed.{i}": _PATCH_EMBED, f"patch_embed.{i}.proj": PATCH_CONVOLUTION}, _EMBED_ENTRY
    )


@Family
def stem(i: int) -> Composition:
    """The resizing of the images for a stem of several convolutions, which is called as it is."""
    return Composition("resizing of the images", {f"patch_embed.{i}": _PATCH_EMBED}, _EMBED_ENTRY)


class FusedCrossVit(Swap, CrossVit):
    """timm.models.crossvit.CrossVit with its patch embeddings of a single convolution in one op: resize, projection,
    CLS token and positions. A dagger model's stem is called as it is, on images that an op has resized."""

    _crossvit_entry = _EMBED_ENTRY

    @staticmethod
    def unusual(module: Any) -> str | None:
        if module.num_branches > 2:
            return f"it has {module.num_branches} branches"
        return "it crops instead of resizing" if module.crop_scale else None

    @classmethod
    def compositions(cls, module: Any) -> Sequence[Composition]:
        return [stem(i) if _has_stem(embed) else patches(i) for i, embed in enumerate(module.patch_embed)]

    def _embed(self: Any, x: Tensor) -> list[Tensor]:
        kernels = getattr(self, KERNELS, None)  # None: restored a moment ago
        if kernels is None or not plain(x) or FusedCrossVit.unusual(self) is not None or not fuses(self, _EMBED):
            return CrossVit._embed(self, x)
        return [self.pos_drop(_branch_tokens(self, i, x, kernels)) for i in range(len(self.patch_embed))]


_EMBED = Composition("embed", {}, _EMBED_ENTRY)


def _has_stem(embed: Any) -> bool:
    """Whether a patch embedding consists of several convolutions."""
    return isinstance(getattr(embed, "proj", None), nn.Sequential)


def _branch_tokens(model: Any, i: int, x: Tensor, kernels: str) -> Tensor:
    """The tokens (B, 1 + N_i, D_i) of branch i, of images x (B, C, H, W)."""
    embed, size = model.patch_embed[i], model.img_size_scaled[i]
    cls_token, positions = (model.cls_token_1, model.pos_embed_1) if i else (model.cls_token_0, model.pos_embed_0)
    several = _has_stem(embed)
    fused = fuses(model, stem if several else patches, i)
    if fused and not several:
        out = blocks.embed(x, embed.proj, cls_token, positions, tuple(size), kernels)
        if out is not None:
            return out
    resized = bicubic_resize(x, tuple(size), kernels=kernels) if fused else scale_image(x, size, model.crop_scale)
    y = embed(resized)
    return torch.cat((cls_token.expand(x.shape[0], -1, -1), y), dim=1) + positions
