"""Which backend serves a call: the meaning of kernels=."""

import functools
import os
import warnings

import torch

from . import availability

# What kernels="auto" takes, by the type of device: the first that is there. CPU: on a 2-core EPYC with AVX-512 and bf16
# units, float32 and bfloat16. CUDA: on an H100, bfloat16, as CUDA graphs; called one by one small batches are slower.
FASTEST: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}
# Dispatcher ops for which a GPU's "auto" was measured between "triton" and "cuda": {op: (the faster one, on what)}. For
# all others it is as above.
MEASURED: dict[str, tuple[str, str]] = {}


@functools.cache
def environment() -> str:
    """The default that CROSSVIT_KERNELS names, or "auto"."""
    name = os.environ.get("CROSSVIT_KERNELS") or "auto"
    if name != "auto" and name not in availability.BACKENDS:
        raise ValueError(f"the environment variable CROSSVIT_KERNELS: expected {availability.CHOICES}, got {name!r}")
    return name


@functools.cache
def _fallback_warning() -> None:
    """Says once that a CPU is served by the reference."""
    warnings.warn(
        f"crossvit_kernels runs on its PyTorch reference: {availability.reason('cpu')}", RuntimeWarning, stacklevel=6
    )


def candidates(device: str, op: str) -> tuple[str, ...]:
    """What kernels="auto" takes for an op, in the order of preference."""
    others = FASTEST.get(device, ())
    return (MEASURED[op][0], *others) if device == "cuda" and op in MEASURED else others


def preferred(kernels: str, device: str, op: str) -> str:
    """The backend that `kernels=` stands for, of an op on that type of device; what it cannot do is another's."""
    name = environment() if kernels == "auto" else kernels
    return next(filter(availability.available, candidates(device, op)), "reference") if name == "auto" else name


_resolved: dict[tuple[str, torch.device, torch.dtype, str], str] = {}


def _resolve(kernels: str, device: torch.device, dtype: torch.dtype, op: str) -> str:
    name = preferred(kernels, device.type, op)
    if kernels == "auto" and environment() == "auto":
        if device.type == "cpu" and name == "reference":
            _fallback_warning()
    elif (why := availability.reason(name)) is not None:
        raise RuntimeError(f"kernels={name!r} is not there: {why}")
    elif device.type == "meta":  # where only shapes are asked for, every backend's are the reference's
        name = "reference"
    elif name != "reference" and device.type not in availability.devices(name):
        if kernels == "auto":  # CROSSVIT_KERNELS speaks of its own kind of device, not of every tensor
            name = "reference"
        else:
            raise ValueError(
                f"kernels={name!r} takes tensors on {availability.devices(name)[-1]}, got tensors on {device}"
            )
    if name != "reference" and (dtype not in availability.dtypes(name) or not availability.serves(name, op)):
        name = "reference"
    return name


def resolve(kernels: str, device: torch.device, dtype: torch.dtype, op: str) -> str:
    """The backend that serves `op` for `kernels=` and tensors of `dtype` on `device`.

    Raises ValueError for an unknown name and for a device that the named backend does not take, RuntimeError, with the
    reason, for a backend asked for by name that is not there.
    """
    key = (kernels, device, dtype, op)
    name = _resolved.get(key)
    if name is None:
        name = _resolved[key] = _resolve(*key)
    return name
