"""What the launches of cls_cross_attention's backward share: sizes and tensors, how the tokens are cut up, and the rows
whose sums are the norm's gradients."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import defaults
from ..configs import Config, configuration
from ..target import architecture
from ..tiling import ROWS, cdiv, head_block, images_per_program, split_tiles


@dataclass(frozen=True)
class Shared:
    """What the launches share: sizes, the op's inputs, what its forward saved, and the gradients to fill."""

    batch: int
    tokens: int
    width: int
    heads: int
    dtype: torch.dtype
    precision: str
    grad_out: Tensor
    cls: Tensor
    patches: Tensor
    norm_weight: Tensor
    norm_bias: Tensor | None
    mean: Tensor
    rstd: Tensor
    probs: Tensor
    context: Tensor
    key_query: Tensor
    grads: dict[str, Tensor]

    @property
    def head(self) -> int:
        """The width of a head."""
        return self.width // self.heads

    @property
    def scale(self) -> float:
        """The factor of the scores."""
        return self.head**-0.5

    @property
    def tiles(self) -> int:
        """Tiles of images."""
        return cdiv(self.batch, ROWS)

    def sizes(self) -> dict[str, Any]:
        """A kernel's arguments batch, D and PRECISION."""
        return {"batch": self.batch, "D": self.width, "PRECISION": self.precision}

    def head_sizes(self) -> dict[str, Any]:
        """A kernel's arguments HEAD and HEAD_BLOCK, with those of `sizes`."""
        return {**self.sizes(), "HEAD": self.head, "HEAD_BLOCK": head_block(self.head)}

    def cls_tokens(self) -> dict[str, Any]:
        """A kernel's arguments to normalise the CLS tokens."""
        return {
            "cls_ptr": self.cls,
            "mean_ptr": self.mean,
            "rstd_ptr": self.rstd,
            "cls_stride": self.cls.stride(0),
            "tokens": self.tokens,
        }


@dataclass(frozen=True)
class Plan:
    """How the tokens are cut up: the pass's configuration, splits of an image's tokens, tiles in each of them, and the
    images of one program behind the pass."""

    config: Config
    splits: int
    tiles: int
    images: int

    @classmethod
    def of(cls, shared: Shared) -> "Plan":
        width, heads, dtype = shared.width, shared.heads, shared.dtype
        default = defaults.token_gradient(width, heads, dtype, shared.precision, architecture())
        config = configuration("token_gradient", width, dtype, default)
        splits, tiles = split_tiles(shared.batch, cdiv(shared.tokens - 1, config["BLOCK_N"]))
        return cls(config, splits, tiles, images_per_program(shared.batch, heads, splits))


@dataclass(frozen=True)
class NormParts:
    """Rows whose sums are the gradients of norm_weight and norm_bias, or None where they are not needed: of every tile
    and head, from the values and then from the keys, and of every tile, from the query; norm_bias has none from the
    keys."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    values: int = 0
    keys: int = 0

    @classmethod
    def of(cls, shared: Shared, plan: Plan) -> "NormParts":
        values, keys = shared.tiles * shared.heads, cdiv(shared.batch, plan.images) * shared.heads
        rows = {"norm_weight": values + keys + shared.tiles, "norm_bias": values + shared.tiles}
        weight, bias = (
            shared.probs.new_empty((count, shared.width)) if name in shared.grads else None
            for name, count in rows.items()
        )
        return cls(weight, bias, values, keys)

    @property
    def weight_from_keys(self) -> Tensor | None:
        return None if self.weight is None else self.weight[self.values :]

    @property
    def weight_from_query(self) -> Tensor | None:
        return None if self.weight is None else self.weight[self.values + self.keys :]

    @property
    def bias_from_query(self) -> Tensor | None:
        return None if self.bias is None else self.bias[self.values :]
