"""Random inputs of the ops from a seeded generator: tokens that are hard on a LayerNorm, memory layouts, parameters."""

import math
from typing import Any

import torch
from torch import Tensor

# Tokens: a mean a hundred times the deviation, one token that dwarfs the others, tokens without variance.
KINDS = ("plain", "far mean", "huge token", "constant tokens")
LAYOUTS = ("permuted", "behind a token", "every other element", "expanded")


class Random:
    """Normal numbers from a seeded generator: the same on every machine. `shift` moves every seed, see machines.py."""

    shift = 0

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed + 10**6 * self.shift)

    def normal(self, *shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        # In float64 first: of float32 ATen makes other numbers in the last bit with other instructions.
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).mul(std).add(mean).float()

    def tokens(self, *shape: int, kind: str = "plain") -> Tensor:
        """Tokens (..., D) of one of KINDS."""
        x = self.normal(*shape)
        rows = x.view(-1, shape[-1])
        if kind == "far mean":
            x += 100
        elif kind == "huge token":
            rows[len(rows) // 2 :][:1] *= 1e4
        elif kind == "constant tokens":
            rows[1::3] = self.normal(len(rows[1::3]), 1)
        return x

    def linear(self, rows: int, columns: int, *, bias: bool = True) -> tuple[Tensor, Tensor | None]:
        """A Linear's weight and bias."""
        return self.normal(rows, columns, std=columns**-0.5), self.normal(rows, std=0.2) if bias else None

    def norm(self, width: int, *, bias: bool = True) -> tuple[Tensor, Tensor | None]:
        """A LayerNorm's weight and bias."""
        return self.normal(width, std=0.2, mean=1.0), self.normal(width, std=0.2) if bias else None

    def drop_path(self, batch: int, dims: int, keep: float = 0.75) -> Tensor:
        """A factor per sample, 0 or 1 / keep, with both where the batch is larger than one."""
        kept = torch.rand(batch, generator=self.generator) < keep
        kept[:2] = torch.tensor([True, False])[:batch]
        return (kept / keep).view(batch, *([1] * (dims - 1)))


def arrange(x: Tensor, layout: str) -> Tensor:
    """x as a view of larger memory in one of LAYOUTS, with NaN where the view does not look."""
    if layout == "permuted":
        order = (1, 0, *range(2, x.dim()))
        return x.permute(order).contiguous().permute(order)
    if layout == "behind a token":
        memory = x.new_full((x.shape[0], x.shape[1] + 1, *x.shape[2:]), math.nan)
        memory[:, 1:] = x
        return memory[:, 1:]
    if layout == "every other element":
        memory = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)
        memory[..., ::2] = x
        return memory[..., ::2]
    return x[:1].expand_as(x)


def layer_norm_linear(rng: Random, *shape: int, out: int, kind: str = "plain", bias: bool = True) -> dict[str, Any]:
    """Inputs of layer_norm_linear, x of this shape to `out` features."""
    norm_weight, norm_bias = rng.norm(shape[-1], bias=bias)
    weight, linear_bias = rng.linear(out, shape[-1], bias=bias)
    x = rng.tokens(*shape, kind=kind)
    return present(x=x, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=linear_bias)


def linear_residual(rng: Random, *shape: int, out: int, bias: bool = True, scale: str | None = None) -> dict[str, Any]:
    """Inputs of linear_residual, x of this shape to `out` features."""
    weight, linear_bias = rng.linear(out, shape[-1], bias=bias)
    residual = rng.normal(*shape[:-1], out)
    return present(
        x=rng.normal(*shape), weight=weight, bias=linear_bias, residual=residual, scale=factor(rng, scale, shape, out)
    )


def layer_norm_mlp(
    rng: Random, *shape: int, hidden: int, kind: str = "plain", bias: bool = True, scale: str | None = None
) -> dict[str, Any]:
    """Inputs of layer_norm_mlp, x of this shape."""
    norm_weight, norm_bias = rng.norm(shape[-1], bias=bias)
    w1, b1 = rng.linear(hidden, shape[-1], bias=bias)
    w2, b2 = rng.linear(shape[-1], hidden, bias=bias)
    x = rng.tokens(*shape, kind=kind)
    scaled = factor(rng, scale, shape, shape[-1])
    return present(x=x, norm_weight=norm_weight, norm_bias=norm_bias, w1=w1, b1=b1, w2=w2, b2=b2, scale=scaled)


def self_attention(rng: Random, batch: int, tokens: int, width: int, heads: int) -> dict[str, Any]:
    """Inputs of self_attention."""
    return {"qkv": rng.normal(batch, tokens, 3 * width), "num_heads": heads}


def bicubic_resize(
    rng: Random, batch: int, height: int, width: int, image_size: int | tuple[int, int], *, channels: int = 3
) -> dict[str, Any]:
    """Inputs of bicubic_resize."""
    return {"images": rng.normal(batch, channels, height, width), "image_size": image_size}


def patch_embed(
    rng: Random,
    batch: int,
    height: int,
    width: int,
    *,
    patch: int,
    embed: int,
    channels: int = 3,
    image_size: int | tuple[int, int] | None = None,
    bias: bool = True,
) -> dict[str, Any]:
    """Inputs of patch_embed."""
    rows, columns = (
        (height, width)
        if image_size is None
        else (image_size, image_size)
        if isinstance(image_size, int)
        else image_size
    )
    tokens = 1 + (rows // patch) * (columns // patch)
    weight, conv_bias = rng.linear(embed, channels * patch * patch, bias=bias)
    return present(
        images=rng.normal(batch, channels, height, width),
        weight=weight.view(embed, channels, patch, patch),
        bias=conv_bias,
        cls_token=rng.normal(1, 1, embed, std=0.5),
        pos_embed=rng.normal(1, tokens, embed, std=0.5),
        image_size=image_size,
    )


def cls_cross_attention(
    rng: Random, batch: int, tokens: int, width: int, heads: int, *, kind: str = "plain", bias: bool = True
) -> dict[str, Any]:
    """Inputs of cls_cross_attention, `tokens` patches."""
    x = rng.tokens(batch, 1 + tokens, width, kind=kind)
    norm_weight, norm_bias = rng.norm(width, bias=bias)
    inputs = present(cls=x[:, 0].clone(), patches=x[:, 1:].clone(), norm_weight=norm_weight, norm_bias=norm_bias)
    for name in "qkv":
        inputs[f"{name}_weight"], inputs[f"{name}_bias"] = rng.linear(width, width, bias=bias)
    return inputs | {"num_heads": heads}


def cls_fusion(
    rng: Random,
    batch: int,
    tokens: int,
    own_width: int,
    width: int,
    heads: int,
    *,
    kind: str = "plain",
    bias: bool = True,
) -> dict[str, Any]:
    """Inputs of cls_fusion, from a branch `own_width` wide to one `width` wide with `tokens` patches."""
    inputs: dict[str, Any] = {
        "cls": rng.tokens(batch, own_width, kind=kind),
        "patches": rng.tokens(batch, tokens, width, kind=kind),
    }
    for name, rows, columns in (("proj", width, own_width), ("", width, width), ("revert", own_width, width)):
        prefix = f"{name}_" if name else ""
        inputs[f"{prefix}norm_weight"], inputs[f"{prefix}norm_bias"] = rng.norm(columns, bias=bias)
        for part in ("q", "k", "v", "out") if not name else (name,):
            inputs[f"{part}_weight"], inputs[f"{part}_bias"] = rng.linear(rows, columns, bias=bias)
    return inputs | {"num_heads": heads}


def factor(rng: Random, scale: str | None, shape: tuple[int, ...], width: int) -> Tensor | None:
    """A `scale`: "sample" (drop path), "channel" (LayerScale) or None."""
    if scale is None:
        return None
    return rng.drop_path(shape[0], len(shape)) if scale == "sample" else rng.normal(width, std=0.3, mean=0.5)


def present(**inputs: Any) -> dict[str, Any]:
    """Required arguments that are None stay, as None; optional ones that are None are left out."""
    return {name: v for name, v in inputs.items() if v is not None or name not in ("scale", "image_size")}


# One small call of every op, whose inputs are all tensors or given: for what does not depend on numbers.
EXAMPLES = {
    "layer_norm_linear": lambda: layer_norm_linear(Random(), 2, 5, 16, out=12) | {"activation": "gelu"},
    "linear_residual": lambda: linear_residual(Random(), 2, 5, 16, out=12, scale="channel"),
    "layer_norm_mlp": lambda: layer_norm_mlp(Random(), 2, 5, 16, hidden=24, scale="sample"),
    "self_attention": lambda: self_attention(Random(), 2, 5, 16, heads=2),
    "bicubic_resize": lambda: bicubic_resize(Random(), 2, 10, 14, (8, 12)),
    "patch_embed": lambda: patch_embed(Random(), 2, 10, 14, patch=4, embed=16, image_size=(8, 12)),
    "cls_cross_attention": lambda: cls_cross_attention(Random(), 2, 5, 16, heads=2),
    "cls_fusion": lambda: cls_fusion(Random(), 2, 5, 12, 16, heads=2),
}
DIFFERENTIABLE = [name for name in EXAMPLES if name != "cls_fusion"]
