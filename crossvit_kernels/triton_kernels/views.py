"""What kernels take: tensors and their strides as named tuples, whose fields kernels read by name."""

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
    """The rows (..., D) of a tensor: row r begins at r // tokens * batch + r % tokens * row, in elements."""

    base: Tensor
    count: int
    tokens: int
    batch: int
    row: int

    @property
    def distance(self) -> int | None:
        """From a row to the next, in elements, where it is the same everywhere."""
        if self.tokens == 1:
            return self.batch
        return self.row if self.batch == self.tokens * self.row else None

    def uncounted(self) -> "Rows":
        """For kernels that are told otherwise how many there are: Triton compiles one more for a number of another kind
        (1, a multiple of 16, any), also where a kernel does not look at it."""
        return self._replace(count=0)


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


def tokens_of(tensor: Tensor) -> Rows:
    """The rows of (B, N, D), `tokens` of them in an image."""
    tensor = tensor if tensor.stride(2) == 1 else tensor.contiguous()
    batch, tokens, _ = tensor.shape
    return Rows(tensor, batch * tokens, tokens, tensor.stride(0), tensor.stride(1))


class Norm(NamedTuple):
    """A LayerNorm's parameters and, for every row, mean and rstd, float32; all but the weight may be None."""

    weight: Tensor
    bias: Tensor | None
    mean: Tensor | None = None
    rstd: Tensor | None = None


class Linear(NamedTuple):
    """A Linear's weight (E, D) and its bias, which may be None."""

    weight: Tensor
    bias: Tensor | None


class Scale(NamedTuple):
    """A residual branch's factor: one value for `rows` rows of a sample, one per channel, or neither."""

    sample: Tensor | None = None
    channel: Tensor | None = None
    rows: int = 1


UNSCALED = Scale()


def scale_of(scale: Tensor | None, per_sample: bool, x: Tensor) -> Scale:
    """`scale`, one value per sample or per channel, for the rows of x (B, ..., D)."""
    if scale is None:
        return UNSCALED
    if per_sample:
        return Scale(sample=scale.reshape(-1).contiguous(), rows=x.numel() // (x.shape[0] * x.shape[-1]))
    return Scale(channel=scale.contiguous())


class Images(NamedTuple):
    """Images (B, C, height, width) and their strides; a pixel of a patch is y_scale by x_scale of theirs."""

    base: Tensor
    batch: int
    channel: int
    row: int
    column: int
    height: int
    width: int
    y_scale: float
    x_scale: float


class Layout(NamedTuple):
    """Patches: `columns` x `lines` of each image, `rows` at one height in all images."""

    rows: int
    columns: int
    lines: int


class Cut(NamedTuple):
    """Images, the patches to cut from them, a patch's side, and whether the images are resized."""

    images: Images
    layout: Layout
    patch: int
    resize: bool

    def arguments(self) -> Arguments:
        """What a kernel takes to find the pixels."""
        options = {"CHANNELS": self.images.base.shape[1], "PATCH": self.patch, "RESIZE": self.resize}
        return {"images": self.images, "layout": self.layout, **options}

    def tiles(self, config: Config) -> int:
        """How many tiles of rows hold the patches."""
        return self.layout.lines * cdiv(self.layout.rows, config["BLOCK_M"])

    def fitted(self, config: Config) -> Config:
        """A configuration fitted to the patches: no more rows than there are, BLOCK_K split into PX and PY."""
        px, py = _pixel_block(self.patch, config["BLOCK_K"]) if self.resize else (config["BLOCK_K"], 1)
        block_m = min(config["BLOCK_M"], max(16, power_of_two(self.layout.rows)))
        return replace(config, blocks={**config.blocks, "BLOCK_M": block_m, "BLOCK_K": px * py, "PX": px})


@functools.cache
def _pixel_block(patch: int, largest: int) -> tuple[int, int]:
    """Columns and rows of pixels, powers of two, of a chunk of about `largest` pixels of a patch, at least 16."""
    px = max(power_of_two(patch), 4)
    return px, max(16 // px, min(power_of_two(patch), largest // px, 16), 1)


def patches_of(images: Tensor, height: int, width: int, patch: int) -> Cut:
    """The patches of `images` at the size (height, width); 32 bits count along a row of pixels."""
    if images.shape[3] * images.stride(3) >= 2**31:
        images = images.contiguous()
    batch, _, own_height, own_width = images.shape
    lines, columns = height // patch, width // patch
    y_scale, x_scale = own_height / (lines * patch), own_width / (columns * patch)
    found = Images._make((images, *images.stride(), own_height, own_width, y_scale, x_scale))
    return Cut(found, Layout(batch * columns, columns, lines), patch, (own_height, own_width) != (height, width))


def contiguous(tensor: Any) -> Any:
    """The tensor, or a copy if it is not contiguous; None of None."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def attention_arguments(call: Any, dtype: torch.dtype) -> Arguments:
    """What kernels of cls_cross_attention take of a call, by name; products are of `dtype`."""
    (batch, count, width), heads = call.patches.shape, call.num_heads
    return {
        "cls": rows_of(call.cls).uncounted(),
        "patches": tokens_of(call.patches).uncounted(),
        "tokens": 1 + count,
        "norm": Norm(contiguous(call.norm_weight), contiguous(call.norm_bias)),
        "q": Linear(contiguous(call.q_weight), contiguous(call.q_bias)),
        "k_weight_ptr": contiguous(call.k_weight),
        "v": Linear(contiguous(call.v_weight), contiguous(call.v_bias)),
        "eps": call.eps,
        "batch": batch,
        "D": width,
        "HEADS": heads,
        "HEAD": width // heads,
        "scale": (width // heads) ** -0.5,
        "PRECISION": dot_precision(dtype),
    }
