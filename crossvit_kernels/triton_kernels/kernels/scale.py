"""The factor of a residual branch: per sample (drop path), per channel (LayerScale) or none."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

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


@triton.jit
def scaled(value, scale_ptr, row, exists, rows_per_sample, column, counts, SCALE: tl.constexpr):
    """value (rows, columns), float32, times its factors; 1 is SAMPLE, 2 CHANNEL."""
    if SCALE == 1:
        value *= tl.load(scale_ptr + row // rows_per_sample, mask=exists, other=0.0).to(tl.float32)[:, None]
    if SCALE == 2:
        value *= tl.load(scale_ptr + column, mask=counts, other=0.0).to(tl.float32)[None, :]
    return value
