"""Swaps the kernels into a model that exists: timm's CrossViT, ViT and DeiT blocks, CaiT's class attention, attention
pooling with one query, and the modules of `crossvit_kernels.nn`.

    model = crossvit_kernels.accelerate(timm.create_model("crossvit_15_dagger_240", pretrained=True))
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from .backends import in_words
from .composition import KERNELS
from .nn import KernelModule, check_kernels
from .swaps import SWAPS, Swap, original_of, outcome, stood_for, swap_of
from .watch import forget

_log = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)
_NOT_ASKED = "accelerate was not asked for it"


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did to a model, by the names of `named_modules`; as a string, in words.

    swapped: the class of each module that now runs on the ops; fused: what of it does, where not all of it may; left:
    why a part that there are ops for is called as it is; others: the class of each part with parameters that there are
    none for, such as a final norm or a head; kernels: the flags that the modules have.
    """

    swapped: dict[str, str] = field(default_factory=dict)
    fused: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        count = len(self.swapped)
        flags = ", ".join(f"kernels={flag!r}{meaning}" for flag, meaning in self.kernels.items())
        runs = "1 module runs" if count == 1 else f"{count or 'no'} modules run"
        lines = [f"{runs} on the kernels" + f" ({flags})" * (count > 0)]
        lines += _grouped({name: (cls, ", ".join(self.fused.get(name, []))) for name, cls in self.swapped.items()})
        disturbed = {name: why for name, why in self.left.items() if why != _NOT_ASKED}
        if disturbed:
            lines.append("called as before, since something stands in the way of the kernels:")
            lines += _grouped({name: (self.swapped.get(name, ""), why) for name, why in disturbed.items()})
        if len(disturbed) < len(self.left):
            lines.append("called as before, since accelerate was not asked for them:")
            lines += _grouped({name: ("", "") for name in self.left if name not in disturbed})
        if not self.swapped and not self.left:
            known = ", ".join(dict.fromkeys(name for _, name in SWAPS))
            lines.append(
                f"there are none for its classes; there are for timm's {known}, and those of crossvit_kernels.nn"
            )
        elif self.others:
            lines.append(f"unchanged, as there are no kernels for these: {', '.join(self.others)}")
        return "\n".join(lines)


def _grouped(modules: Mapping[str, tuple[str, str]]) -> list[str]:
    """A line for those that have the same to say of them, {name: (class, text)}, with their names."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, said in modules.items():
        groups.setdefault(said, []).append(name or "the model itself")
    lines = []
    for (cls, text), names in groups.items():
        where = ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]}, … {names[-1]}"
        what = f"{len(names)} x {cls}" if cls else where
        lines.append(f"  {what}" + f" ({where})" * bool(cls) + f": {text}" * bool(text))
    return lines


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
        verbose: say what runs on the kernels now, and why the rest does not: logged as INFO, or printed where nothing
            shows the logger "crossvit_kernels.accelerate". `acceleration(model)` tells it at any time.

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
        elif (swap := swap_of(module)) is not None and outcome(swap, module)[0]:
            module.__dict__[KERNELS] = kernels  # first: another thread may call the module
            module.__class__ = swap  # type: ignore[assignment]
    if verbose:
        _tell(acceleration(model))
    return model


def _tell(report: Acceleration) -> None:
    if _log.isEnabledFor(logging.INFO) and _log.hasHandlers():
        _log.info("%s", report)
    else:
        print(report)


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
    found = Acceleration(kernels=_flags(model))
    _look("", model, found)
    return found


def _look(name: str, module: nn.Module, found: Acceleration, inside: bool = False) -> None:
    """Notes `module` and what is in it; `inside` a module that there is a swap for, only others of that kind."""
    if isinstance(module, Swap):
        swap = next(c for c in type(module).__mro__ if Swap in c.__bases__)
        found.swapped[name] = original_of(swap).__qualname__
        found.fused[name], why = outcome(swap, module)
        if why:
            found.left[name] = "; ".join(why)
    elif isinstance(module, KernelModule):
        found.swapped[name] = type(module).__qualname__
    elif (candidate := swap_of(module)) is not None:
        found.left[name] = "; ".join(outcome(candidate, module)[1]) or _NOT_ASKED
    elif (base := stood_for(module)) is not None:
        found.left[name] = f"{_class(module)} is a subclass of {base}, and may compute something else"
    elif not inside and not _contains(module):
        if any(True for _ in module.parameters()):
            found.others[name] = _class(module)
        return
    inside = inside or name in found.swapped or name in found.left
    for child, m in module.named_children():
        _look(f"{name}.{child}" if name else child, m, found, inside)


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _contains(module: nn.Module) -> bool:
    """Whether a swap, or a module that there is a swap for, or of a subclass of such, is in it."""
    return any(isinstance(m, Swap | KernelModule) or swap_of(m) or stood_for(m) for m in module.modules())


def _flags(model: nn.Module) -> dict[str, str]:
    """The values of kernels= that the model's modules have, and what they mean where its parameters are."""
    flags = {getattr(m, KERNELS, None) or m.kernels: "" for m in model.modules() if isinstance(m, Swap | KernelModule)}
    first = next(model.parameters(), None)
    if first is None or first.device.type not in ("cpu", "cuda"):
        return flags
    where = "the CPU" if first.device.type == "cpu" else "the GPU"
    return {flag: f": {in_words(flag, first.device.type, first.dtype)} on {where}" for flag in flags}
