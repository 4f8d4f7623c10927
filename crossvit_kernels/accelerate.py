"""Swaps the kernels into a model that exists: timm's CrossViT, ViT and DeiT blocks, CaiT's class attention, attention
pooling with one query, and the modules of `crossvit_kernels.nn`.

    model = crossvit_kernels.accelerate(timm.create_model("crossvit_15_dagger_240", pretrained=True))
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from .composition import forget
from .nn import KernelModule, check_kernels
from .swaps import KERNELS, Swap, original_of, reasons, swap_of

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did to a model, by the names of `named_modules`.

    swapped: the class of each module that now runs on the ops; left: why each other part with parameters stays.
    """

    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = Counter(self.swapped.values())
        lines = ["swapped: " + (", ".join(f"{n} x {name}" for name, n in counts.items()) or "nothing")]
        lines += [f"left: {name or 'the model itself'}: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def accelerate(model: Model, kernels: str = "auto", *, verbose: bool = True) -> Model:
    """Makes the modules of `model` that the kernels stand for run on them, in place.

    Parameters, their names, hooks, device, dtype, mode and the state dict stay as they are; so it may come before or
    after loading weights, moving, casting, wrapping in DDP or compiling. What is not exactly what it seems (adapters,
    parametrised or quantised Linears, hooks on a child, options that the ops do not know) is called as it is, also if
    that comes about later: a swapped module looks before it fuses. Where that concerns one half of a block, the other
    half is fused still.

    Args:
        model: any module; what is inside it is looked at too. One that was accelerated before gets `kernels`.
        kernels: the backend, see `crossvit_kernels.backends`.
        verbose: print what was swapped, and what was left and why; `acceleration(model)` tells it at any time.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is no module; ValueError, RuntimeError: no such backend, or it is not available. Nothing is
            changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_kernels(kernels)
    for module in model.modules():
        if isinstance(module, KernelModule):
            module.__dict__.setdefault("_kernels_before", module.kernels)
            module.kernels = kernels
        elif isinstance(module, Swap):
            module.__dict__[KERNELS] = kernels
        elif (swap := swap_of(module)) is not None and reasons(swap, module)[1]:
            module.__dict__[KERNELS] = kernels  # first: another thread may call the module
            module.__class__ = swap  # type: ignore[assignment]
    if verbose:
        print(acceleration(model))
    return model


def restore(model: Model) -> Model:
    """Undoes `accelerate` exactly, in place, and returns `model`.

    Raises:
        TypeError: `model` is no module, or a swapped module's class was changed again since (by FSDP2, say): that has
            to be undone first. Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    swapped: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, Swap)}
    for name, module in swapped.items():
        if Swap not in type(module).__bases__:
            raise TypeError(f"{name}: its class was changed to {type(module).__qualname__} after it was accelerated")
    for module in swapped.values():
        module.__class__ = original_of(type(module))
        module.__dict__.pop(KERNELS, None)
        forget(module)
    for child in model.modules():
        if isinstance(child, KernelModule) and "_kernels_before" in child.__dict__:
            child.kernels = child.__dict__.pop("_kernels_before")
            forget(child)
    return model


def acceleration(model: nn.Module) -> Acceleration:
    """What of `model` runs on the ops now, and why the rest does not."""
    found = Acceleration()
    _look("", model, found)
    return found


def _look(name: str, module: nn.Module, found: Acceleration, inside: bool = False) -> None:
    """Notes `module` and what is in it; `inside` a module that there is a swap for, only others of that kind."""
    if isinstance(module, Swap):
        swap = next(c for c in type(module).__mro__ if Swap in c.__bases__)
        found.swapped[name] = original_of(swap).__qualname__
        if why := reasons(swap, module)[0]:
            found.left[name] = "; ".join(why)
    elif isinstance(module, KernelModule):
        found.swapped[name] = type(module).__qualname__
    elif (candidate := swap_of(module)) is not None:
        found.left[name] = "; ".join(reasons(candidate, module)[0]) or "not accelerated"
    elif not inside and not _contains(module):
        if any(True for _ in module.parameters()):
            found.left[name] = f"there are no kernels for {type(module).__module__}.{type(module).__qualname__}"
        return
    inside = inside or name in found.swapped or name in found.left
    for child, m in module.named_children():
        _look(f"{name}.{child}" if name else child, m, found, inside)


def _contains(module: nn.Module) -> bool:
    """Whether a swap, or a module that there is a swap for, is in it."""
    return any(isinstance(m, Swap | KernelModule) or swap_of(m) is not None for m in module.modules())
