"""Checks of a model's arguments before anything is built of them. Each raises TypeError or ValueError that names the
argument, what came and what was expected.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..system.memory import check_memory

MOST_BLOCKS = 1000  # in a model: each takes a millisecond to build


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, and no bool."""
    return not isinstance(value, bool) and isinstance(value, Integral)


def is_number(value: Any) -> bool:
    """Whether a value is a real number, and no bool."""
    return not isinstance(value, bool) and isinstance(value, Real)


def check_integer(name: str, value: Any, least: int) -> None:
    """`value` is an integer of at least `least`."""
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(value)}")


def check_number(name: str, value: Any) -> None:
    """`value` is a finite number of more than 0."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be more than 0, got {shown(value)}")


def check_rate(name: str, value: Any) -> None:
    """`value` is a number (its range is what `check_rates` looks at)."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number between 0 and 1, got {shown(value)}")


def check_flags(**flags: Any) -> None:
    """Each is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {shown(value)}")


def check_branches(branches: int | None = None, whole: Sequence[str] = (), **arguments: Any) -> None:
    """Each argument is a sequence of positive numbers, one per branch; those named in `whole` of integers."""
    for name, values in arguments.items():
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise TypeError(f"{name} must be a sequence with an entry per branch, got {shown(values)}")
        fits, expected = (is_integer, "integers") if name in whole else (is_number, "numbers")
        if not all(map(fits, values)):
            raise TypeError(f"{name} must have {expected} as entries, got {shown(values)}")
        if not values or not all(0 < value < math.inf for value in values) or len(values) != (branches or len(values)):
            count = f"for each of the {branches} branches of patch_size" if branches else "per branch"
            raise ValueError(f"{name} must have a positive entry {count}, got {shown(values)}")


def check_depth(depth: Any, branches: int) -> None:
    """`depth` has a row per stage: the blocks of every branch, then the fusion's layers."""
    expected = f"depth must have rows of {branches} branch depths and the fusion's, none negative"
    if not isinstance(depth, Sequence) or not all(isinstance(row, Sequence) for row in depth):
        raise TypeError(f"{expected}, got {shown(depth)}")
    if not all(is_integer(value) for row in depth for value in row):
        raise TypeError(f"{expected}, in integers, got {shown(depth)}")
    if not depth or any(len(row) != branches + 1 or min(row) < 0 for row in depth):
        raise ValueError(f"{expected}, got {shown(depth)}")
    check_blocks(sum(max(1, sum(row)) for row in depth))


def check_blocks(count: int) -> None:
    """A model of `count` blocks can be built."""
    if count > MOST_BLOCKS:
        raise ValueError(f"depth must make at most {MOST_BLOCKS:,} blocks, got {shown(count)}")


def block_weights(dim: int, mlp_ratio: float) -> int:
    """The weights of a transformer block's Linears. Raises ValueError where its MLP has no width, or an endless one."""
    hidden = dim * mlp_ratio
    if not 1 <= hidden < 1e15:
        raise ValueError(
            f"mlp_ratio must make an MLP at least 1 wide, got {shown(mlp_ratio)} for a width of {shown(dim)}"
        )
    return 4 * dim**2 + 2 * dim * int(hidden)


def check_sizes(**counts: int) -> None:
    """Weights of so many numbers, by the arguments that make them, fit into memory (where the model is to be there)."""
    probe = torch.empty(0)
    if type(probe) is not Tensor or probe.device.type != "cpu":
        return
    name, most = max(counts.items(), key=lambda item: item[1])
    size = sum(counts.values()) * probe.element_size()
    check_memory(
        f"the model's weights, most of them by {name.replace('__', ' and ')} ({in_short(most)} numbers),", size
    )


def in_short(count: int) -> str:
    """A count, also one of hundreds of digits."""
    return f"{count:,}" if count < 10**15 else f"over 10^{len(str(count)) - 1}" if count < 10**4000 else "far too many"


def shown(value: Any) -> str:
    """A value as it may stand in a message."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "far too many"
    return text if len(text) <= 200 else f"{text[:197]}..."
