"""The GPU that launches are for: the one at hand or, while launches are recorded, the one that is recorded for."""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
import triton.language as tl

from . import interprets

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}  # as kernels take them

INTERPRETED = interprets()  # as triton.jit, which reads it where the kernels are defined

_targets: list[str] = []
_Value = TypeVar("_Value")


@contextmanager
def pushed(stack: list[_Value], value: _Value) -> Iterator[_Value]:
    """Inside, the value is the last of the stack."""
    stack.append(value)
    try:
        yield value
    finally:
        stack.pop()


def targeting(architecture: str) -> AbstractContextManager[str]:
    """Launches inside are prepared as `architecture` ("sm_90") would get them."""
    return pushed(_targets, architecture)


def architecture() -> str:
    """The architecture that is launched on: "sm_90", or "interpreter"."""
    if _targets:
        return _targets[-1]
    return "interpreter" if INTERPRETED else _of_device(torch.cuda.current_device())


@functools.cache
def _of_device(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def multiprocessors() -> int:
    """Multiprocessors of the current device; an H200's 132 while recording; 1 in the interpreter."""
    if _targets:
        return 132
    return 1 if INTERPRETED else _multiprocessors_of(torch.cuda.current_device())


@functools.cache
def _multiprocessors_of(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot: for float32 what torch's own matrix products are set to, TF32 or IEEE."""
    return "tf32" if dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
