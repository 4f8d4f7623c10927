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

import interpreter
from crossvit_kernels import backends

if os.environ.get("TRITON_INTERPRET") == "1" and backends.available("triton"):
    import triton.runtime.interpreter

    interpreter.speed_up(triton.runtime.interpreter)

# What PyTorch makes of std::invalid_argument: the former up to 2.14, the latter from 2.15 on.
FROM_CPP = (ValueError, RuntimeError)
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
    cpu = torch.ops.crossvit_kernels_cpu
    before = cpu.instruction_set()
    cpu.set_instruction_set(name)
    try:
        yield
    finally:
        cpu.set_instruction_set(before)


def built_instruction_sets() -> list[str]:
    """Those compiled into the CPU kernels, which have to be there."""
    return torch.ops.crossvit_kernels_cpu.instruction_sets().split()


def fill_empty_memory_with_nan(fill: bool = True) -> None:
    """Whether memory that PyTorch and the native kernels hand out uninitialised holds NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(fill, warn_only=True)
    for name in NATIVE:
        if name != "triton":
            getattr(torch.ops, f"crossvit_kernels_{name}").fill_empty_with_nan(fill)


@contextmanager
def empty_memory_filled_with_nan() -> Iterator[None]:
    """Such memory holds NaN within; afterwards all is as it was."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill_empty_memory_with_nan()
    try:
        yield
    finally:
        fill_empty_memory_with_nan(False)
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def instruction_sets() -> list[str]:
    """Those compiled into the CPU kernels that this CPU has; none without CPU kernels."""
    if not backends.available("cpu"):
        return []
    found = []
    for name in built_instruction_sets():
        with suppress(*FROM_CPP), instruction_set(name):
            found.append(name)
    return found
