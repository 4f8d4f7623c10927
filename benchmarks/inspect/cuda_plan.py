"""What the CUDA kernels of an op will do on a GPU: launches as the emulation records them, resources from the library.

Nothing is run: the launchers are called with memory that nobody touches, and the emulation notes what they launch.
"""

import ctypes
import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crossvit_kernels import backends
from crossvit_kernels.dispatch.op import REGISTERED

from ..cases import Cell
from . import cuda_report
from .compiled import Resources

MULTIPROCESSORS = 132  # of an H100 and an H200
_NOTED, _INSTEAD = 1, 2  # what crossvit_emulation_record takes


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid, threads and dynamic shared memory; `copied` bytes by asynchronous copies where
    it was run."""

    kernel: str
    grid: tuple[int, ...]
    threads: int
    shared: int
    copied: int

    @property
    def name(self) -> str:
        return cuda_report.short(self.kernel)


@dataclass(frozen=True)
class Call:
    """What one call of an op, or of its forward and backward, launches, and the bytes of what it takes and gives (each
    tensor once) and of the memory that it allocates for itself."""

    launches: list[Launch]
    tensors: dict[str, int]
    scratch: int


def missing() -> str | None:
    """Why there is no plan of the CUDA kernels here, or None. In a process without a GPU's kernels the emulation is
    switched on by the first question."""
    os.environ.setdefault("CROSSVIT_KERNELS_EMULATE", "1")
    os.environ.setdefault("CROSSVIT_KERNELS_EMULATE_MULTIPROCESSORS", str(MULTIPROCESSORS))
    if not backends.emulated():
        return "the CUDA kernels of this process are not emulated, CROSSVIT_KERNELS_EMULATE=1"
    if (why := backends.reason("cuda")) is not None:
        return why
    return None if cuda_report.LIBRARY.is_file() else "crossvit_kernels/_cuda.so was not built"


@contextmanager
def recording(run: bool = False) -> Iterator[list[Launch]]:
    """Launches inside are collected when it ends; they are run only if asked to."""
    emulation = ctypes.CDLL(str(cuda_report.LIBRARY.with_name("_emulation.so")))
    emulation.crossvit_emulation_launches.restype = ctypes.c_char_p
    launches: list[Launch] = []
    emulation.crossvit_emulation_record(_NOTED if run else _INSTEAD)
    try:
        yield launches
        rows = json.loads(emulation.crossvit_emulation_launches())
        launches.extend(Launch(**row | {"grid": tuple(row["grid"])}) for row in rows)
    finally:
        emulation.crossvit_emulation_record(0)


def call(cell: Cell, inputs: list[Any], run: bool = False) -> Call:
    """The op's forward, or its forward for training and its backward."""
    op, kernels = REGISTERED[cell.op].spec, REGISTERED[cell.op]
    with _Allocations() as allocated, recording(run) as launches:
        result = kernels.forwards["cuda"](*inputs, cell.backward)
        out, *saved = result if isinstance(result, tuple) else (result,)
        given = dict(zip(op.inputs, inputs)) | {"out": out} | dict(zip(op.saved, saved))
        if cell.backward:
            kept = [inputs[i] for i in op.kept]
            tensors = [op.inputs[i] for i in op.kept if i in op.tensors]
            wanted = [name in cell.differentiable() for name in tensors]
            grad_out = torch.empty_like(out)
            gradients = kernels.backwards["cuda"](grad_out, *kept, *([out] if op.takes_out else []), *saved, wanted)
            names = [f"grad {name}" for name, needed in zip(tensors, wanted) if needed]
            given |= {"grad out": grad_out} | dict(zip(names, gradients))
    bytes_of = {n: t.numel() * t.element_size() for n, t in given.items() if isinstance(t, Tensor) and t.numel()}
    made = [n for n in bytes_of if n not in op.inputs]
    return Call(launches, bytes_of, max(0, allocated.bytes - sum(bytes_of[n] for n in made)))


class _Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside, by the native ops too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "crossvit_kernels_cuda":
            with self:  # what the op calls is seen; the op itself would be again
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if "empty" in func.name() or "zeros" in func.name():
            self.bytes += result.numel() * result.element_size()
        return result


@functools.cache
def _kernels(architecture: str) -> dict[str, cuda_report.Kernel]:
    """The library's kernels for an architecture, by name."""
    return {kernel.name: kernel for kernel in cuda_report.kernels(cuda_report.LIBRARY, (architecture,))}


def resources(launch: Launch, architecture: str) -> Resources:
    """What the compiler says of a launched kernel. KeyError where the library has no code for the architecture."""
    kernel = _kernels(architecture)[launch.name]
    return Resources(
        registers=kernel.registers,
        stack=kernel.stack,
        shared=kernel.shared + launch.shared,
        num_warps=-(-launch.threads // 32),
        matrix={"mma": kernel.matrix},
        products=[],
        architecture=architecture,
    )
