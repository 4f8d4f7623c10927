"""What every module over the ops is: it has a backend, and checks what it is made with."""

from torch import nn

from .. import backends


def check_kernels(kernels: str) -> str:
    """`kernels` itself if it is "auto" or a backend that is there. Raises ValueError (unknown name), RuntimeError (not
    there, and why).
    """
    if kernels != "auto" and (why := backends.reason(kernels)):
        raise RuntimeError(f"kernels={kernels!r} is not available: {why}")
    return kernels


NO_SCRIPT = (
    "TorchScript cannot compile modules that run on the kernels: for a model that was accelerated call "
    "crossvit_kernels.restore(model) first; torch.jit.trace and torch.export take them as they are"
)


class KernelModule(nn.Module):
    """A module whose forward calls ops; `kernels` is what it hands them."""

    def __init__(self, *, kernels: str = "auto") -> None:
        super().__init__()
        self.kernels = check_kernels(kernels)

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(NO_SCRIPT)


def set_kernels(module: nn.Module, kernels: str) -> None:
    """Makes `module` and every module inside it use `kernels`. Raises as `check_kernels` does, and then changes
    nothing.
    """
    check_kernels(kernels)
    for child in module.modules():
        if isinstance(child, KernelModule):
            child.kernels = kernels


def check_rates(**rates: float) -> None:
    """Raises ValueError for a probability outside [0, 1]."""
    for name, rate in rates.items():
        if not 0 <= rate <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {rate}")


def check_heads(dim: int, num_heads: int) -> None:
    """Raises ValueError unless `num_heads` divides `dim`."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide the width, got num_heads={num_heads} for dim={dim}")
