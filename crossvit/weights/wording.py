"""How what is in a checkpoint is named in messages."""

import argparse
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_LISTED = 16  # names that an error spells out


def describe(value: object) -> str:
    """In a few words what an entry of a checkpoint is."""
    if isinstance(value, argparse.Namespace):
        return f"{counted(len(vars(value)), 'argument')} of a command line"
    if isinstance(value, Tensor):
        return (
            f"a tensor of {str(value.dtype).removeprefix('torch.')}, {'×'.join(map(str, value.shape)) or 'one value'}"
        )
    if isinstance(value, Mapping | list | tuple):
        tensors = list(tensors_of(value))
        if tensors:
            return f"{counted(len(tensors), 'tensor')}, {counted(sum(tensor.numel() for tensor in tensors), 'number')}"
        if isinstance(value, Mapping) and 0 < len(value) <= 6 and all(_plain(entry) for entry in value.values()):
            return ", ".join(f"{name} {describe(entry)}" for name, entry in value.items())
        return counted(len(value), "entry")
    text = f"{value:.6g}" if isinstance(value, float) else f"{value}"
    return " ".join((text if len(text) <= 80 else f"{text[:79]}…").split())


def kind(value: object) -> str:
    """What a value is that was expected to be something else."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    traits = [f"of {value.dtype}"]
    if value.layout != torch.strided:
        traits.append(f"in layout {value.layout}")
    if value.is_meta:
        traits.append("without values")
    return f"a tensor {', '.join(traits)}"


def some(items: list[str]) -> str:
    """The first of them."""
    return ", ".join(items[:_LISTED]) + (f", … ({len(items) - _LISTED} more)" if len(items) > _LISTED else "")


def tensors_of(value: object) -> Iterable[Tensor]:
    """Every tensor in nested mappings and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors_of(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors_of(entry)


def _plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def counted(number: int, what: str) -> str:
    """A number and its noun, in the plural where it takes one."""
    plural = what if number == 1 else what.removesuffix("y") + ("ies" if what.endswith("y") else "s")
    return f"{number:,} {plural}"
