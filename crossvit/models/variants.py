"""The paper's models by name: timm's names, the authors' as aliases, and the baselines of its Tables 2 and 8."""

import difflib
from dataclasses import dataclass
from typing import Any

# How the published models are evaluated: images standardised so, and of the resized image its centre, by this share of
# its sides, but for the models whose names end so.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP_RATIO = 0.875
_CROP_RATIOS = {"_408": 1.0, "_504": 1.0, "_patch16_224": 0.9}


def default_crop_ratio(variant: str | None) -> float:
    """The side of the centre crop over the resized image's that a published model is evaluated with."""
    return next((ratio for end, ratio in _CROP_RATIOS.items() if variant and variant.endswith(end)), CROP_RATIO)


@dataclass(frozen=True)
class Variant:
    """One named model: its class's own arguments."""

    arguments: dict[str, Any]
    single_branch: bool = False


def _crossvit(
    embed_dim: tuple[int, int],
    blocks: int,
    num_heads: int,
    mlp_ratio: float,
    multi_conv: bool = False,
    small: int = 240,
    large: int = 224,
) -> Variant:
    """Three stages of one block over small patches and `blocks` over large ones; `small` and `large` are the sides of
    the two images.
    """
    arguments = dict(
        image_size=small,
        img_scale=(1.0, large / small),
        patch_size=(12, 16),
        embed_dim=embed_dim,
        depth=((1, blocks, 0),) * 3,
        num_heads=(num_heads, num_heads),
        mlp_ratio=(mlp_ratio, mlp_ratio),
        multi_conv=multi_conv,
    )
    return Variant(arguments)


def _deit(embed_dim: int, depth: int, num_heads: int, mlp_ratio: float, multi_conv: bool = False) -> Variant:
    arguments = dict(
        image_size=224,
        patch_size=16,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        multi_conv=multi_conv,
    )
    return Variant(arguments, single_branch=True)


VARIANTS: dict[str, Variant] = {
    "crossvit_tiny_240": _crossvit((96, 192), 4, 3, 4.0),
    "crossvit_small_240": _crossvit((192, 384), 4, 6, 4.0),
    "crossvit_base_240": _crossvit((384, 768), 4, 12, 4.0),
    "crossvit_9_240": _crossvit((128, 256), 3, 4, 3.0),
    "crossvit_15_240": _crossvit((192, 384), 5, 6, 3.0),
    "crossvit_18_240": _crossvit((224, 448), 6, 7, 3.0),
    "crossvit_9_dagger_240": _crossvit((128, 256), 3, 4, 3.0, multi_conv=True),
    "crossvit_15_dagger_240": _crossvit((192, 384), 5, 6, 3.0, multi_conv=True),
    "crossvit_18_dagger_240": _crossvit((224, 448), 6, 7, 3.0, multi_conv=True),
    "crossvit_15_dagger_408": _crossvit((192, 384), 5, 6, 3.0, multi_conv=True, small=408, large=384),
    "crossvit_18_dagger_408": _crossvit((224, 448), 6, 7, 3.0, multi_conv=True, small=408, large=384),
    # In the paper only (18† at 480); of the sizes that both patches divide 504 / 480 is the one that costs its 56.6 G.
    "crossvit_18_dagger_504": _crossvit((224, 448), 6, 7, 3.0, multi_conv=True, small=504, large=480),
    "deit_tiny_patch16_224": _deit(192, 12, 3, 4.0),
    "deit_small_patch16_224": _deit(384, 12, 6, 4.0),
    "deit_base_patch16_224": _deit(768, 12, 12, 4.0),
    "deit_9_224": _deit(256, 9, 4, 3.0),
    "deit_15_224": _deit(384, 15, 6, 3.0),
    "deit_18_224": _deit(448, 18, 7, 3.0),
    "deit_9_dagger_224": _deit(256, 9, 4, 3.0, multi_conv=True),
    "deit_15_dagger_224": _deit(384, 15, 6, 3.0, multi_conv=True),
    "deit_18_dagger_224": _deit(448, 18, 7, 3.0, multi_conv=True),
}

# The authors name a model by the side of its large-patch branch, timm by its input's.
_AUTHORS = {"_240": "_224", "_408": "_384", "_504": "_480"}
ALIASES: dict[str, str] = {
    name.removesuffix(timm) + authors: name
    for name in VARIANTS
    for timm, authors in _AUTHORS.items()
    if name.startswith("crossvit_") and name.endswith(timm)
} | {f"deit_{size}_224": f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")}


def canonical_name(name: str) -> str:
    """The name under which `VARIANTS` holds `name`, an alias of the authors' or timm's with its tag. Raises ValueError
    for an unknown one.
    """
    plain = name.removesuffix(".in1k")
    plain = ALIASES.get(plain, plain)
    if plain not in VARIANTS:
        close = difflib.get_close_matches(plain, [*VARIANTS, *ALIASES], n=3)
        hint = f": did you mean {' or '.join(close)}?" if close else "; crossvit.list_models() lists them"
        raise ValueError(f"unknown model {name!r}{hint}")
    return plain
