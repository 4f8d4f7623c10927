"""What `accelerate` puts in the place of other libraries' modules, and how it tells whether it may.

A swap is a subclass of the module's own class that overrides its forward. The module becomes one by a change of its
`__class__`: parameters, names, hooks and everything else that it holds stay as they are. Each forward looks at its
children again and calls the original one where something has changed since: another kind of child (an adapter, a
quantised Linear), a hook on one, a dropout that is at work.
"""

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import affine, drop_path_scale

# The class, by module and name, and the swap for it, by file and name. Looked up by name: timm need not be installed.
SWAPS = {
    ("timm.models.vision_transformer", "Block"): ("vision_transformer", "FusedBlock"),
    ("timm.models.crossvit", "MultiScaleBlock"): ("crossvit", "FusedMultiScaleBlock"),
    ("timm.models.crossvit", "CrossAttentionBlock"): ("crossvit", "FusedCrossAttentionBlock"),
    ("timm.models.crossvit", "CrossVit"): ("crossvit", "FusedCrossVit"),
    ("timm.models.cait", "LayerScaleBlock"): ("cait", "FusedLayerScaleBlock"),
    ("timm.models.cait", "LayerScaleBlockClassAttn"): ("cait", "FusedLayerScaleBlockClassAttn"),
    ("timm.layers.attention_pool", "AttentionPoolLatent"): ("attention_pool", "FusedAttentionPoolLatent"),
}


class Swap:
    """Mixed into a subclass of the class that it stands for, which comes next among its bases."""

    _crossvit_kernels = "auto"  # of an instance: what the ops are asked for
    replaced: tuple[str, ...] | None = None  # the children that forward does not call; None: all

    def refusal(self: Any) -> str | None:
        """Why this module, an instance of the original class as far as its contents go, has to stay as it is."""
        raise NotImplementedError

    def ready(self: Any) -> bool:
        """Whether nothing speaks against the ops now. Who the children were when `refusal` last looked is remembered:
        to see that they still are, and have no hooks, takes a tenth of the time."""
        if torch.compiler.is_compiling():
            return self.refusal() is None
        for modules, name, child, kind in self.__dict__.get("_crossvit_children", ((None,) * 4,)):
            if modules is None or modules.get(name) is not child or type(child) is not kind or _watched(child):
                break
        else:
            return True
        if self.refusal() is not None:
            return False
        self.__dict__["_crossvit_children"] = tuple(_children(self, self.replaced))
        return True


def _watched(child: nn.Module) -> bool:
    """Whether calling this module does more than run its class's forward."""
    return bool(
        child._forward_hooks
        or child._forward_pre_hooks
        or child._backward_hooks
        or child._backward_pre_hooks
        or "forward" in child.__dict__
    )


def _children(module: nn.Module, names: Sequence[str] | None = None) -> Iterator[tuple[dict, str, nn.Module, type]]:
    for name, child in module._modules.items():
        if child is not None and (names is None or name in names):
            yield module._modules, name, child, type(child)
            yield from _children(child)


def swap_of(module: nn.Module) -> type[Swap] | None:
    """The swap for a module of exactly this class."""
    found = SWAPS.get((type(module).__module__, type(module).__qualname__))
    return None if found is None else getattr(importlib.import_module(f"{__name__}.{found[0]}"), found[1])


def original_of(swap: type) -> type:
    """The class that a swap stands for."""
    return swap.__bases__[1]


def disturbance(module: nn.Module, names: Sequence[str] | None = None) -> str | None:
    """Which child of `module`, at any depth, has a hook or a forward of its own; of its own children those in `names`,
    None: all."""
    for name, child in module._modules.items():
        if child is None or (names is not None and name not in names):
            continue
        if _watched(child):
            return f"{name} has a " + ("forward of its own" if "forward" in child.__dict__ else "hook")
        if child._modules and (inside := disturbance(child)) is not None:
            return f"{name}.{inside}"
    return None


def wrong_type(name: str, module: Any, *expected: type) -> str | None:
    """Why the child `name` is not exactly one of the classes `expected`; parametrised modules are of another class."""
    if type(module) in expected:
        return None
    return f"{name} is {type(module).__module__}.{type(module).__qualname__}"


def wrong_norm(name: str, norm: Any) -> str | None:
    """Why `norm` is no LayerNorm over the last dimension with a weight."""
    if type(norm) is not nn.LayerNorm:
        if type(norm).__module__ != "timm.layers.norm" or type(norm).__qualname__ != "LayerNorm":
            return wrong_type(name, norm, nn.LayerNorm)
        if norm._fast_norm:
            return f"{name} is timm's fast norm"
    if norm.weight is None:
        return f"{name} has no weight"
    return None if len(norm.normalized_shape) == 1 else f"{name} is over {len(norm.normalized_shape)} dimensions"


def wrong_gelu(name: str, activation: Any) -> str | None:
    """Why `activation` is not GELU by erf."""
    if type(activation) is nn.GELU:
        return None if activation.approximate == "none" else f"{name} is GELU by {activation.approximate}"
    return wrong_type(name, activation, nn.GELU)


def wrong_linear(*linears: tuple[str, Any]) -> str | None:
    """Why not all of these are plain Linears with a floating-point weight."""
    for name, linear in linears:
        if (why := wrong_type(name, linear, nn.Linear)) is not None:
            return why
        if not linear.weight.is_floating_point():
            return f"{name} has a {linear.weight.dtype} weight"
    return None


def drops(*modules: Any) -> bool:
    """Whether one of these dropouts (or drop paths, or identities) would drop something now."""
    return any(m.training and (getattr(m, "p", 0.0) or getattr(m, "drop_prob", 0.0)) > 0 for m in modules)


def wrong_drop(*modules: tuple[str, Any]) -> str | None:
    """Why not all of these are dropouts, timm's drop paths or identities."""
    for name, module in modules:
        known = type(module) in (nn.Dropout, nn.Identity)
        if not known and (type(module).__module__, type(module).__qualname__) != ("timm.layers.drop", "DropPath"):
            return wrong_type(name, module)
    return None


def path_scale(x: Tensor, drop_path: Any) -> Tensor | None:
    """What a drop path multiplies the samples of x's branch by, (B, 1, ..., 1), or None where it does nothing now."""
    if not drops(drop_path):
        return None
    if drop_path.scale_by_keep:
        return drop_path_scale(x, drop_path.drop_prob)
    return x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1 - drop_path.drop_prob)


__all__ = [
    "SWAPS",
    "Swap",
    "affine",
    "disturbance",
    "drops",
    "original_of",
    "path_scale",
    "swap_of",
    "wrong_drop",
    "wrong_gelu",
    "wrong_linear",
    "wrong_norm",
    "wrong_type",
]
