"""Which backends this machine has, and how it runs them: without a GPU, Triton's kernels in Triton's interpreter and
the CUDA kernels in the emulation, on CPU tensors."""

import os
from collections.abc import Iterator

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


def instruction_sets() -> Iterator[str]:
    """Those compiled into the CPU kernels that this CPU has, each in force while it is the current one; none without
    CPU kernels. The one in force before comes back."""
    if not backends.available("cpu"):
        return
    from crossvit_kernels import _C

    before = _C.cpu_instruction_set()
    try:
        for name in _C.build_info()["instruction_sets"]:
            try:
                _C.set_instruction_set(name)
            except ValueError:  # this CPU lacks it
                continue
            yield name
    finally:
        _C.set_instruction_set(before)
