"""When a composition may apply the weights of its children itself.

A fused composition reads the weights of the modules that it stands for and does not call them. That is right only
where a call of each of them would do nothing but what its class is known to do. `why_not` says in words what stands
against it; where something does, the modules are called as they are, with the result that they give.

`watch.py` asks it at every call, and remembers what was found.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .dispatch.torch_internals import (
    CALLS,
    MODULES_UNKNOWN,
    OVERRIDES,
    constant_result,
    foreign_mode,
    hooked,
    own_call,
    returns_seen,
    watched_by_all,
)
from .kinds import Kind

ENTRY = "_crossvit_entry"  # of a class that stands in for another: that class and the method that is overridden
_OUTSIDE, _INSIDE = CALLS
KERNELS = "_crossvit_kernels"  # of an instance of such a class: what the ops are asked for; others have `kernels`
METHODS = ("forward", "__call__", _INSIDE)  # of a class, what a call of an instance runs


@dataclass(frozen=True, eq=False)
class Composition:
    """The children of a module that one fused composition stands for.

    name: what it is, in messages.
    parts: {path below the module: what has to be there}.
    entry: for a module that stands in for another class, that class and its method that is overridden.
    settings: the module's own attributes that it depends on.
    """

    name: str
    parts: Mapping[str, Kind]
    entry: tuple[type, str] | None = None
    settings: tuple[str, ...] = ()


class Family:
    """The compositions that a function makes of its arguments, each of them once; a decorator.

    make: the function itself. torch.compile warns where a traced function calls one of functools.cache, and traces what
    is in it; so it gets the function, which it calls while it traces alone.
    """

    def __init__(self, make: Callable[..., Composition]) -> None:
        self.make = make
        self.known: Callable[..., Composition] = functools.cache(make)
        self.__doc__ = make.__doc__

    def __call__(self, *arguments: Any) -> Composition:
        """The composition of these arguments, the same one every time but in a traced function."""
        return (self.make if torch.compiler.is_compiling() else self.known)(*arguments)


# What the forwards of the modules call: a dictionary, a key in it, and the value there when this package was imported.
FUNCTIONS = [
    (F.__dict__, name, F.__dict__[name])
    for name in ("linear", "layer_norm", "gelu", "conv2d", "scaled_dot_product_attention")
]


def replaced_function() -> str | None:
    """The first function of torch.nn.functional that modules would call and that somebody replaced, in words."""
    for home, name, function in FUNCTIONS:
        if home.get(name) is not function:
            return f"torch.nn.functional.{name} was replaced"
    return None


def why_not(owner: nn.Module, composition: Composition) -> str | None:
    """What stands against applying the weights of these children of `owner` without calling them, in words; None where
    nothing does."""
    if MODULES_UNKNOWN is not None:
        return MODULES_UNKNOWN
    if not torch.compiler.is_compiling() and (why := watched_by_all() or foreign_mode() or replaced_function()):
        return why
    if composition.entry is not None and not genuine(*composition.entry):
        cls, method = composition.entry
        return f"{cls.__qualname__}.{method} was replaced"
    for path, expected in composition.parts.items():
        child = child_at(owner, path)
        if (why := expected.why_not(child)) is not None:
            return f"{path} {why}"
        if child is None and _is_plain_attribute(owner, path):
            return f"{path} is not a registered module"
        if child is not None and (why := _disturbance(child)) is not None:
            return f"{path} {why}"
    return None


def child_at(owner: nn.Module, path: str) -> nn.Module | None:
    """The module at this path below `owner`, which has "" itself; None where there is none."""
    child: nn.Module | None = owner
    for name in path.split(".") if path else ():
        child = None if child is None else child._modules.get(name)
    return child


def _is_plain_attribute(owner: nn.Module, path: str) -> bool:
    """Whether something that is no registered module stands where the child `path` would."""
    parent, _, name = path.rpartition(".")
    home = child_at(owner, parent)
    return home is not None and home.__dict__.get(name) is not None


def _disturbance(child: nn.Module) -> str | None:
    """Why calling this module does more than its class's own forward, as the end of a sentence."""
    if hooked(child):
        return "has a hook"
    if "forward" in child.__dict__ or _INSIDE in child.__dict__:
        return "has a forward of its own"
    cls = type(child)
    if not genuine(cls, "forward") or not genuine(cls, _INSIDE):
        return f"is a {cls.__qualname__}, whose forward was replaced"
    entry = cls.__dict__.get(ENTRY)
    if entry is not None and not genuine(*entry):
        return f"is a {entry[0].__qualname__}, whose {entry[1]} was replaced"
    if torch.compiler.is_compiling():
        return None
    if child.__dict__.get("_compiled_call_impl") is not None:
        return "was compiled by itself"
    return None if _called_by_torch(cls) else f"is a {cls.__qualname__}, whose __call__ was replaced"


def unseen(module: nn.Module) -> bool:
    """Whether no hook or mode, and no forward but the one in its class's source, sees what this module returns."""
    if returns_seen(module) or not module.__dict__.keys().isdisjoint(OVERRIDES):
        return False
    return genuine(type(module), "forward") and foreign_mode() is None


@constant_result
def genuine(cls: type, method: str) -> bool:
    """Whether the class's method is the one that stands in its source, and not one that was put there later."""
    for base in cls.__mro__:
        if method in base.__dict__:
            function = base.__dict__[method]
            code = getattr(function, "__code__", None)
            home = sys.modules.get(base.__module__)
            return (
                code is not None
                and code.co_qualname == f"{base.__qualname__}.{method}"
                and function.__globals__ is getattr(home, "__dict__", None)
            )
    return False


def _called_by_torch(cls: type) -> bool:
    """Whether a call of an instance runs nn.Module's own code."""
    return own_call(cls) is nn.Module.__dict__[_OUTSIDE] and all(genuine(nn.Module, name) for name in CALLS)
