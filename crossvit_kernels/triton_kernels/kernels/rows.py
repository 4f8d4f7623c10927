"""Rows of activations that may be strided views, and how wide rows are cut into blocks."""

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv

FEW_ROWS = 256  # up to here tiles of 16 rows are better


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


@functools.cache
def block_of(width: int, largest: int = 128, smallest: int = 32) -> int:
    """The power of two that covers `width` with the least rest; of several the largest."""
    blocks = [smallest]
    while blocks[-1] < largest:
        blocks.append(2 * blocks[-1])
    return min(blocks, key=lambda block: (cdiv(width, block) * block, -block))


@triton.jit
def row_offsets(rows, tokens, batch_stride, row_stride):
    """Where these rows begin, see Rows."""
    rows = rows.to(tl.int64)
    batch = rows // tokens
    return batch * batch_stride + (rows - batch * tokens) * row_stride
