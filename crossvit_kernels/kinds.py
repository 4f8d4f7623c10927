"""What the children of a fused composition have to be, and which tensors the ops take beside one another."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .dispatch.torch_internals import STAND_INS

_PLAIN = frozenset({Tensor, nn.Parameter, type(None)})
_AUTOCAST_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


@dataclass(frozen=True, eq=False)
class Kind:
    """What a child has to be: an instance of exactly one of `classes`, with the settings that a kernel knows.

    classes: (module, qualified name) of each class; by name, since timm need not be installed.
    wrong: what is wrong with an instance's settings, in words, or None.
    settings: the attributes that `wrong` reads and that a kernel takes.
    optional: whether the child may be None.
    """

    classes: frozenset[tuple[str, str]]
    wrong: Callable[[Any], str | None] | None = None
    settings: tuple[str, ...] = ()
    optional: bool = False

    def why_not(self, module: Any) -> str | None:
        """What speaks against this child, as the end of a sentence that begins with its name; or None."""
        if module is None and self.optional:
            return None
        cls = type(module)
        if (cls.__module__, cls.__qualname__) not in self.classes:
            expected = " or ".join(sorted({name.rpartition(".")[2] for _, name in self.classes}))
            found = "missing" if module is None else f"{cls.__module__}.{cls.__qualname__}"
            return f"is {found}, where {expected or 'nothing'} is expected"
        return self.wrong(module) if self.wrong is not None else None


def kind(*classes: str, wrong: Any = None, settings: tuple[str, ...] = (), optional: bool = False) -> Kind:
    """A `Kind` of classes given as "module:qualified name"."""
    names = [name.split(":") for name in classes]
    return Kind(frozenset((module, name) for module, name in names), wrong, settings, optional)


def _wrong_weights(module: nn.Module) -> str | None:
    for name in ("weight", "bias"):
        if name in module.__dict__ and name in module._parameters:
            return f"has a {name} that hides its parameter"
        value = getattr(module, name)
        if value is not None and (why := strange(value)) is not None:
            return f"has a {name} that is {why}"
    return None


def _wrong_norm(norm: Any) -> str | None:
    if getattr(norm, "_fast_norm", False):
        return "is timm's fast norm"
    if norm.weight is None:
        return "has no weight"
    if len(norm.normalized_shape) != 1:
        return f"is over {len(norm.normalized_shape)} dimensions"
    return _wrong_weights(norm)


def _wrong_gelu(activation: nn.GELU) -> str | None:
    return None if activation.approximate == "none" else f"is GELU by {activation.approximate}"


def _wrong_convolution(conv: nn.Conv2d) -> str | None:
    if conv.kernel_size != conv.stride or conv.kernel_size[0] != conv.kernel_size[1]:
        return "is a convolution of another stride than its kernel's size"
    if conv.groups != 1 or set(conv.dilation) != {1} or (conv.padding != "valid" and set(conv.padding) != {0}):
        return "is a convolution with groups, dilation or padding"
    if "_conv_forward" in conv.__dict__:
        return "has a convolution of its own"
    return _wrong_weights(conv)


_WEIGHTS = ("weight", "bias")
LINEAR = kind("torch.nn.modules.linear:Linear", wrong=_wrong_weights, settings=_WEIGHTS)
LAYER_NORM = kind(
    "torch.nn.modules.normalization:LayerNorm",
    "timm.layers.norm:LayerNorm",
    wrong=_wrong_norm,
    settings=("_fast_norm", "normalized_shape", "eps", *_WEIGHTS),
)
GELU = kind("torch.nn.modules.activation:GELU", wrong=_wrong_gelu, settings=("approximate",))
IDENTITY = kind("torch.nn.modules.linear:Identity", optional=True)
LINEAR_OR_IDENTITY = kind(
    "torch.nn.modules.linear:Linear",
    "torch.nn.modules.linear:Identity",
    wrong=lambda m: None if type(m) is nn.Identity else _wrong_weights(m),
    settings=_WEIGHTS,
)
DROPOUT = kind("torch.nn.modules.dropout:Dropout", "torch.nn.modules.linear:Identity")
ABSENT = kind(optional=True)
PATCH_CONVOLUTION = kind(
    "torch.nn.modules.conv:Conv2d",
    wrong=_wrong_convolution,
    settings=("kernel_size", "stride", "groups", "dilation", "padding", "_conv_forward", *_WEIGHTS),
)


def strange(value: Any) -> str | None:
    """Why this weight is not a plain tensor of floating-point numbers, in words."""
    if (cls := strange_type(value)) is not None:
        return f"a {cls.__module__}.{cls.__qualname__}"
    if value is None:
        return None
    if value.layout is not torch.strided:
        return f"of {value.layout}"
    return None if value.is_floating_point() else f"of {value.dtype}"


def plain(*tensors: Any) -> bool:
    """Whether each of these is a plain tensor or None, not a subclass, a tracer's proxy or something else."""
    if torch.compiler.is_compiling():
        return all(isinstance(t, Tensor | None) and strange_type(t) is None for t in tensors)
    return _PLAIN.issuperset(map(type, tensors)) or all(strange_type(t) is None for t in tensors)


def strange_type(value: Any) -> type | None:
    """The class of a value that is neither a plain tensor nor a tracer's stand-in for one."""
    cls = type(value)
    return None if cls in _PLAIN or cls.__module__.startswith(STAND_INS) else cls


def takes(x: Tensor, matrices: Iterable[Tensor | None], norms: Iterable[Tensor | None] = ()) -> bool:
    """Whether the ops compute with x beside these weights: plain, dense tensors whose dtypes go together.

    Matrices (and biases) are of x's dtype; a LayerNorm's parameters, its weight and its bias in turn, may be float32
    where that has 16 bits. Under autocast all but float64 go together.
    """
    matrices, norms = tuple(matrices), tuple(norms)
    if any(weight is None for weight in norms[::2]):
        return False
    if not plain(x, *matrices, *norms):
        return False
    if any(t is not None and t.layout is not torch.strided for t in (x, *matrices, *norms)):
        return False
    dtype = x.dtype
    others = {t.dtype for t in (*matrices, *norms) if t is not None}
    if others == {dtype}:
        return dtype.is_floating_point
    if x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type):
        return {dtype, *others} <= _AUTOCAST_DTYPES
    if dtype not in (torch.bfloat16, torch.float16) or any(t is not None and t.dtype is not dtype for t in matrices):
        return False
    return all(t is None or t.dtype in (dtype, torch.float32) for t in norms)
