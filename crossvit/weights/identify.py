"""Which model a state dict belongs to, read from its names and shapes alone."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..models.branch_images import branch_size
from ..models.variants import VARIANTS, Variant


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
        if "cls_token" in state:  # one branch, whose blocks make one stage
            suffixes, block, stem = [""], r"blocks()().\d+.norm1.weight", "patch_embed"
        else:
            suffixes = [f"_{b}" for b in range(sum(key.startswith("cls_token_") for key in state))]
            block, stem = r"blocks.(\d+).blocks.(\d+).\d+.norm1.weight", "patch_embed.0"
        blocks = [match for match in (re.fullmatch(block, key) for key in state) if match]
        counts = Counter((match[1], match[2]) for match in blocks)
        mlps = {match[2]: state[match[0].replace("norm1", "mlp.fc1")].shape[0] for match in blocks}
        if not suffixes or not blocks:
            return None
        branches = [suffix.removeprefix("_") for suffix in suffixes]
        return dict(
            embed_dim=tuple(state[f"cls_token{suffix}"].shape[-1] for suffix in suffixes),
            depth=tuple(tuple(counts[stage, b] for b in branches) for stage in sorted({stage for stage, _ in counts})),
            mlp_width=tuple(mlps[b] for b in branches),
            multi_conv=f"{stem}.proj.0.weight" in state,
            tokens=tuple(state[f"pos_embed{suffix}"].shape[1] for suffix in suffixes),
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
