"""Which model a state dict belongs to, read from its names and shapes alone."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .model import branch_size
from .variants import VARIANTS, Variant


def identify(state: Mapping[str, Tensor]) -> str:
    """The name of the model that `state` (timm's keys) belongs to, or in words what else it is."""
    traits = _traits(state)
    if traits is None:
        return "weights of some other kind of model"
    tokens = traits.pop("tokens")
    same = [name for name, variant in VARIANTS.items() if _variant_traits(variant) == traits]
    for name in same:
        if _variant_tokens(VARIANTS[name]) == tokens:
            return name
    if same:
        return f"{same[0]} for images of another size"
    return "a model with " + ", ".join(f"{key}={value}" for key, value in traits.items())


def _traits(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """embed_dim, depth, mlp width and stem of a CrossViT's or a single-branch model's state dict; None if it is
    neither's.
    """
    try:
        if "cls_token" in state:
            names, block = ["cls_token"], r"blocks\.()(\d+)\.norm1\.weight"
            first, mlp = ["patch_embed"], ["blocks.0"]
        else:
            branches = sum(re.fullmatch(r"cls_token_\d+", key) is not None for key in state)
            names, block = (
                [f"cls_token_{b}" for b in range(branches)],
                r"blocks\.(\d+)\.blocks\.(\d+)\.\d+\.norm1\.weight",
            )
            first, mlp = (
                [f"patch_embed.{b}" for b in range(branches)],
                [f"blocks.0.blocks.{b}.0" for b in range(branches)],
            )
        if not names:
            return None
        matches = filter(None, (re.fullmatch(block, key) for key in state))
        counts = Counter((match[1], match[2]) if len(names) > 1 else ("", "") for match in matches)
        stages = sorted({stage for stage, _ in counts})
        return dict(
            embed_dim=tuple(state[name].shape[-1] for name in names),
            depth=tuple(
                tuple(counts[stage, str(b) if len(names) > 1 else ""] for b in range(len(names))) for stage in stages
            ),
            mlp_width=tuple(state[f"{prefix}.mlp.fc1.weight"].shape[0] for prefix in mlp),
            multi_conv=f"{first[0]}.proj.0.weight" in state,
            tokens=tuple(state[name.replace("cls_token", "pos_embed")].shape[1] for name in names),
        )
    except (KeyError, IndexError):
        return None


def _variant_traits(variant: Variant) -> dict[str, Any]:
    given = variant.arguments
    if variant.single_branch:
        given = given | dict(
            embed_dim=(given["embed_dim"],), mlp_ratio=(given["mlp_ratio"],), depth=((given["depth"], 0),)
        )
    return dict(
        embed_dim=given["embed_dim"],
        depth=tuple(tuple(row[:-1]) for row in given["depth"]),
        mlp_width=tuple(int(dim * ratio) for dim, ratio in zip(given["embed_dim"], given["mlp_ratio"])),
        multi_conv=given["multi_conv"],
    )


def _variant_tokens(variant: Variant) -> tuple[int, ...]:
    given = variant.arguments
    size, patches = (given["image_size"],) * 2, given["patch_size"]
    branches = [(1.0, patches)] if variant.single_branch else list(zip(given["img_scale"], patches))
    return tuple(1 + math.prod(side // patch for side in branch_size(size, scale, patch)) for scale, patch in branches)
