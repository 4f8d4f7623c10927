"""What a model shows of its inside: which intermediate features are asked for, and the form they come in."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

FORMATS = ("NCHW", "NLC")
Indices = int | list[int] | tuple[int, ...] | None


def take_indices(indices: Indices, count: int) -> list[int]:
    """timm's reading of `indices`: None all of `count`, an int the last so many, a sequence those (negative ones from
    the end). Raises ValueError for what is out of range.
    """
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        if not 0 < indices <= count:
            raise ValueError(f"indices: the last n of {count} features asks for 1 to {count}, got {indices}")
        return list(range(count - indices, count))
    taken = [i + count if i < 0 else i for i in indices]
    if not taken or not all(0 <= i < count for i in taken):
        raise ValueError(f"indices must lie between {-count} and {count - 1}, got {indices!r}")
    return taken


def check_format(output_fmt: str) -> None:
    """Raises ValueError unless `output_fmt` is "NCHW" or "NLC"."""
    if output_fmt not in FORMATS:
        raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")


def formatted(patches: Tensor, grid: tuple[int, int], output_fmt: str) -> Tensor:
    """Patches (B, rows * columns, D) as they are for "NLC", as (B, D, rows, columns) for "NCHW"."""
    return patches.transpose(1, 2).unflatten(2, grid).contiguous() if output_fmt == "NCHW" else patches


def describe_features(widths: Sequence[int], reductions: Sequence[int], stages: int) -> list[dict[str, Any]]:
    """timm's `feature_info`: the width of every branch's features behind every stage, how many pixels of the input lie
    between two of them, and the module that they come from.
    """
    return [
        dict(num_chs=width, reduction=reduction, module=f"blocks.{k}")
        for width, reduction in zip(widths, reductions)
        for k in range(stages)
    ]
