"""Which backends exist on this machine, and if not, why."""

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")


def reason(name: str) -> str | None:
    """Why the backend `name` is not there; None where it is."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {BACKENDS}")
    return None if name == "reference" else "not built: no kernels of this backend in this version"


def available(name: str) -> bool:
    """Whether the backend `name` works on this machine."""
    return reason(name) is None


def resolve(kernels: str, device: torch.device, dtype: torch.dtype, op: str) -> str:
    """The backend that serves `kernels` for tensors of `dtype` on `device`."""
    if kernels == "auto":
        return "reference"
    if why := reason(kernels):
        raise RuntimeError(f"kernels={kernels!r} is not available: {why}")
    return kernels


def report() -> str:
    """Prints, and returns, what exists here and why the rest does not."""
    text = "\n".join(f"{name}: {reason(name) or 'available'}" for name in BACKENDS)
    print(text)
    return text
