"""Which backends exist on this machine, and if not, why; which devices, dtypes and ops each takes."""

import functools
import importlib.util
import os
from pathlib import Path

import torch

from .. import triton_kernels
from .build_record import INSTALL, read_record

BACKENDS = ("reference", "cpu", "triton", "cuda")
"""The names that `kernels=` takes beside "auto"."""
CHOICES = "'auto' or one of " + ", ".join(map(repr, BACKENDS))

_DTYPES = {  # others go to the reference
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}
_DEVICES = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
_CAPABILITY = (8, 0)  # the least that the GPU kernels are written for


@functools.cache
def load_library(name: str) -> str | None:
    """Registers the ops of a library of the package, or says why it cannot."""
    try:
        torch.ops.load_library(Path(__file__).parent.with_name(name))
    except OSError as error:
        return f"crossvit_kernels/{name} cannot be loaded ({error.__cause__ or error}); {INSTALL} again"
    return None


def _load_cpu() -> str | None:
    """Registers the ops of the CPU's library, or says why it is not there."""
    _, why = read_record("crossvit_kernels/_cpu.so")
    if why is not None or (why := load_library("_cpu.so")) is not None:
        return why
    try:
        torch.ops.crossvit_kernels_cpu.instruction_set()
    except (ValueError, RuntimeError) as error:  # the latter from PyTorch 2.15 on
        return f"the environment variable CROSSVIT_KERNELS_ISA: {error}"
    return None


cpu_missing = _load_cpu()
"""Why the CPU's kernels are not there; None where they are."""


def reason(name: str) -> str | None:
    """Why the backend `name` is not there, in words; None where it is. ValueError where no backend has that name."""
    if name not in BACKENDS:
        raise ValueError(f"kernels: expected {CHOICES}, got {name!r}")
    if name == "reference":
        return None
    if name == "triton":
        return _triton_missing()
    return cpu_missing if name == "cpu" else cuda_missing()


_NO_GPU = "no CUDA device was found"


@functools.cache
def _triton_missing() -> str | None:
    """Why the Triton kernels cannot run here."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if triton_kernels.interprets():
        return None
    if not torch.cuda.is_available():
        return f"{_NO_GPU}; on CPU tensors Triton runs in its interpreter, TRITON_INTERPRET=1"
    return _gpu_unfit()


@functools.cache
def emulated() -> bool:
    """Whether the CUDA kernels run in the emulation, on CPU tensors: CROSSVIT_KERNELS_EMULATE, read once."""
    return os.environ.get("CROSSVIT_KERNELS_EMULATE", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def cuda_missing() -> str | None:
    """Why the CUDA kernels cannot run here; loads them."""
    name = "_emulation.so" if emulated() else "_cuda.so"
    record, why = read_record(f"crossvit_kernels/{name}")
    if why is not None:
        return why
    if not emulated():
        if not torch.cuda.is_available():
            if read_record("crossvit_kernels/_emulation.so")[1] is not None:
                return _NO_GPU
            return f"{_NO_GPU}; on CPU tensors the kernels run in an emulation, CROSSVIT_KERNELS_EMULATE=1"
        if (why := _gpu_unfit() or _not_built_for(record["cuda"]["architectures"])) is not None:
            return why
    return load_library(name)


def _gpu_unfit() -> str | None:
    if torch.version.cuda is None:
        return "this torch was built for another vendor's GPUs than NVIDIA's"
    capability = torch.cuda.get_device_capability()
    if capability < _CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
    return None


def _not_built_for(architectures: list[str]) -> str | None:
    """None where one of the architectures runs on this GPU: code on its own generation, PTX on all later ones."""
    major, minor = torch.cuda.get_device_capability()
    for name in architectures:
        kind, _, number = name.partition("_")
        exact = number.rstrip("af") != number
        built = divmod(int(number.rstrip("af")), 10)
        if built == (major, minor) or (
            not exact and built <= (major, minor) and (kind == "compute" or built[0] == major)
        ):
            return None
    return (
        f"crossvit_kernels/_cuda.so was built for {', '.join(architectures)}, the GPU has compute capability "
        f"{major}.{minor}; {INSTALL} again, with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


def devices(name: str) -> tuple[str, ...]:
    """The types of device whose tensors the backend `name` takes."""
    if name == "cuda" and emulated():
        return ("cpu",)
    return ("cpu", "cuda") if name == "triton" and triton_kernels.interprets() else (_DEVICES[name],)


def dtypes(name: str) -> tuple[torch.dtype, ...]:
    """The dtypes the backend `name` computes in; others go to the reference."""
    if name != "triton":
        return _DTYPES[name]
    # Triton's interpreter corrupts bfloat16.
    return (torch.float32, torch.float16, *(() if triton_kernels.interprets() else (torch.bfloat16,)))


def available(name: str) -> bool:
    """Whether the backend `name` works on this machine. ValueError where no backend has that name."""
    return reason(name) is None


def serves(name: str, op: str) -> bool:
    """Whether the backend `name` has kernels of its own for `op`; where not, the reference serves it there."""
    if name == "reference":
        return True
    if name == "triton":
        return available(name) and op in triton_kernels.SERVED
    return available(name) and hasattr(getattr(torch.ops, f"crossvit_kernels_{name}"), op)
