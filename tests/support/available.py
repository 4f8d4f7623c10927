"""Which backends this machine has, and how it runs them: without a GPU, Triton's kernels in Triton's interpreter and
the CUDA kernels in the emulation, on CPU tensors."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
    os.environ.setdefault("CROSSVIT_KERNELS_EMULATE", "1")

from crossvit_kernels import backends

NATIVE = [name for name in backends.BACKENDS if name != "reference" and backends.available(name)]


def interpreted(backend: str | None) -> bool:
    """Whether the backend runs here without the GPU that it is written for, which is slow."""
    return backend in ("triton", "cuda") and not GPU


def computes(backend: str, precision: object) -> bool:
    """Whether the backend's own kernels compute in this precision here."""
    return (precision.autocast or precision.inputs) in backends.dtypes(backend)


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Has the CPU kernels use this one within; the one in force before comes back. Raises ValueError where this CPU
    lacks it, or it was not compiled in."""
    from crossvit_kernels import _C

    before = _C.cpu_instruction_set()
    _C.set_instruction_set(name)
    try:
        yield
    finally:
        _C.set_instruction_set(before)


def instruction_sets() -> list[str]:
    """Those compiled into the CPU kernels that this CPU has; none without CPU kernels."""
    if not backends.available("cpu"):
        return []
    from crossvit_kernels import _C

    found = []
    for name in _C.build_info()["instruction_sets"]:
        with suppress(ValueError), instruction_set(name):
            found.append(name)
    return found
