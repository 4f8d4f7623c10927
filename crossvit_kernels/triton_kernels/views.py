"""Tensors as kernels take them: rows of activations that may be strided views, a residual branch's factor, images as
patches."""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .configs import Config
from .target import dot_precision
from .tiling import cdiv, power_of_two

Arguments = dict[str, Any]  # of several kernels, by name; each takes those that it has parameters for


class Rows(NamedTuple):
    """The rows (..., D) of a tensor: row r begins at r // tokens * batch_stride + r % tokens * row_stride."""

    tensor: Tensor
    count: int
    tokens: int
    batch_stride: int
    row_stride: int

    @property
    def distance(self) -> int | None:
        """From a row to the next, in elements, where it is the same everywhere."""
        if self.tokens == 1:
            return self.batch_stride
        return self.row_stride if self.batch_stride == self.tokens * self.row_stride else None

    def arguments(self, name: str) -> dict[str, Tensor | int]:
        """A kernel's arguments <name>_ptr, <name>_tokens, <name>_batch and <name>_row."""
        return {
            f"{name}_ptr": self.tensor,
            f"{name}_tokens": self.tokens,
            f"{name}_batch": self.batch_stride,
            f"{name}_row": self.row_stride,
        }


def optional_arguments(rows: Rows | None, name: str) -> dict[str, Tensor | int | None]:
    """`rows.arguments(name)`; of no rows a null pointer."""
    if rows is None:
        return {f"{name}_ptr": None, f"{name}_tokens": 1, f"{name}_batch": 0, f"{name}_row": 0}
    return {**rows.arguments(name)}


def rows_of(tensor: Tensor) -> Rows:
    """The rows of (..., D): views of at most three dimensions whose rows are dense stay as they are."""
    width = tensor.shape[-1]
    count = tensor.numel() // width
    if not tensor.is_contiguous():
        if tensor.dim() == 2 and tensor.stride(1) == 1:
            return Rows(tensor, count, 1, tensor.stride(0), 0)
        if tensor.dim() == 3 and tensor.stride(2) == 1:
            return Rows(tensor, count, tensor.shape[1], tensor.stride(0), tensor.stride(1))
        tensor = tensor.contiguous()
    return Rows(tensor, count, 1, width, 0)


NONE, SAMPLE, CHANNEL = 0, 1, 2


class Scale(NamedTuple):
    """The factor as a kernel takes it; `rows_per_sample` rows share one of its values where it is per sample."""

    values: Tensor | None
    kind: int
    rows_per_sample: int

    def arguments(self) -> dict[str, Tensor | int | None]:
        """A kernel's arguments scale_ptr, rows_per_sample and SCALE."""
        return {"scale_ptr": self.values, "rows_per_sample": self.rows_per_sample, "SCALE": self.kind}


UNSCALED = Scale(None, NONE, 1)


def scale_of(scale: Tensor | None, per_sample: bool, x: Tensor) -> Scale:
    """`scale`, one value per sample or per channel, for the rows of x (B, ..., D)."""
    if scale is None:
        return UNSCALED
    if per_sample:
        return Scale(scale.reshape(-1).contiguous(), SAMPLE, x.numel() // (x.shape[0] * x.shape[-1]))
    return Scale(scale.contiguous(), CHANNEL, 1)


class Images(NamedTuple):
    """Images and the patches to cut from them: `columns` x `lines` of them, at the size (height, width)."""

    tensor: Tensor
    patch: int
    lines: int
    columns: int
    resize: bool

    @property
    def rows(self) -> int:
        """Patches at one height in all images."""
        return self.tensor.shape[0] * self.columns

    def arguments(self) -> dict[str, Tensor | int | float | bool]:
        """What a kernel takes to find the pixels."""
        _, channels, height, width = self.tensor.shape
        batch, channel, row, column = self.tensor.stride()
        return {
            "images_ptr": self.tensor,
            "image_batch": batch,
            "image_channel": channel,
            "image_row": row,
            "image_column": column,
            "in_height": height,
            "in_width": width,
            "y_scale": height / (self.lines * self.patch),
            "x_scale": width / (self.columns * self.patch),
            "rows": self.rows,
            "per_row": self.columns,
            "lines": self.lines,
            "CHANNELS": channels,
            "PATCH": self.patch,
            "RESIZE": self.resize,
        }

    def fitted(self, config: Config) -> Config:
        """A configuration fitted to the patches: no more rows than there are, BLOCK_K split into PX and PY."""
        px, py = _pixel_block(self.patch, config["BLOCK_K"]) if self.resize else (config["BLOCK_K"], 1)
        block_m = min(config["BLOCK_M"], max(16, power_of_two(self.rows)))
        return replace(config, blocks={**config.blocks, "BLOCK_M": block_m, "BLOCK_K": px * py, "PX": px})


@functools.cache
def _pixel_block(patch: int, largest: int) -> tuple[int, int]:
    """Columns and rows of pixels, powers of two, of a chunk of about `largest` pixels of a patch, at least 16."""
    px = max(power_of_two(patch), 4)
    return px, max(16 // px, min(power_of_two(patch), largest // px, 16), 1)


def images_of(images: Tensor, height: int, width: int, patch: int) -> Images:
    """The patches of `images` at the size (height, width); 32 bits count along a row of pixels."""
    if images.shape[3] * images.stride(3) >= 2**31:
        images = images.contiguous()
    resize = tuple(images.shape[2:]) != (height, width)
    return Images(images, patch, height // patch, width // patch, resize)


def row_blocks(images: Images, config: Config) -> int:
    """How many tiles hold the patches at one height."""
    return cdiv(images.rows, config["BLOCK_M"])


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def pointers(**tensors: Tensor | None) -> Arguments:
    """A kernel's arguments <name>_ptr, made contiguous where they are not."""
    return {f"{n}_ptr": t if t is None or t.is_contiguous() else t.contiguous() for n, t in tensors.items()}


def attention_arguments(cls: Tensor, patches: Tensor, num_heads: int, dtype: torch.dtype) -> Arguments:
    """What kernels of cls_cross_attention take of the tokens, dense rows, and their sizes; products are of `dtype`."""
    batch, count, width = patches.shape
    return {
        "cls_ptr": cls,
        "cls_stride": cls.stride(0),
        "patches_ptr": patches,
        "patches_batch": patches.stride(0),
        "patches_token": patches.stride(1),
        "patches": count,
        "tokens": count + 1,
        "batch": batch,
        "D": width,
        "HEADS": num_heads,
        "HEAD": width // num_heads,
        "scale": (width // num_heads) ** -0.5,
        "PRECISION": dot_precision(dtype),
    }
