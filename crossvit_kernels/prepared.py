"""A fused inference call on the CPU that is made again.

Between a module's forward and C++ stand some twenty questions in Python: whether the children are what the composition
stands for, whether dropout is at work, what the weights are and whether they fit, which backend serves them. Their
answers are the same at every call until something changes. A call that was served by C++ is therefore kept as
`Prepared`: which op it was, and where its arguments were read. While the children are found unchanged, the next call
reads the arguments there and hands them to C++, which looks at all of them before it touches memory; what it refuses
goes the usual way, as does everything that `Prepared` does not know.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter, getitem, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from . import backends
from .composition import Composition
from .dispatch.torch_internals import any_autocast, foreign_mode, observed, plain_call
from .watch import WATCHES, Watch, watches_of

Source = tuple[Any, Any]
"""Where an argument is read: a dictionary and a key in it, or a tuple and a place in it."""

NOTHING: Source = ({"": None}, "")
"""The source of None."""

_TENSORS = frozenset({Tensor, nn.Parameter})
_TYPES = _TENSORS | {type(None), float, int}
_dtype = attrgetter("dtype")


def weights(module: nn.Module) -> tuple[Source, Source]:
    """The sources of a Linear's or a LayerNorm's weight and bias."""
    return (module._parameters, "weight"), (module._parameters, "bias")


def attribute(module: nn.Module, name: str) -> Source:
    """The source of an attribute that is a number."""
    return module.__dict__, name


class Prepared:
    """A call into C++ as it was made before, for modules in evaluation.

    watch: what has to be as it was.
    name: the op. kernels: the module's choice of a backend.
    inputs: those of that call. sources: the arguments behind the first input, but for the other inputs, of which
        `before` of them stand in front.
    """

    def __init__(
        self, watch: Watch, name: str, kernels: str, inputs: Sequence[Tensor], sources: Sequence[Source], before: int
    ) -> None:
        self.watch, self.name, self.kernels, self.before = watch, name, kernels, before
        self.native = getattr(torch.ops.crossvit_kernels_cpu, name).default
        self.homes, self.keys = zip(*sources)
        arguments: list[Any] = [*map(getitem, self.homes, self.keys)]
        self.types, self.shape = [*map(type, arguments)], arguments[0].shape
        self.tensors = itemgetter(*(i for i, argument in enumerate(arguments) if isinstance(argument, Tensor)))
        self.dtypes = [*map(_dtype, (*inputs, *self.tensors(arguments)))]

    def __call__(self, *inputs: Tensor) -> Any:
        """The op's result; None where the call is to go the usual way: other types, dtypes, a first weight of another
        shape (which of a convolution is the patch), or what C++ refuses."""
        x, *others = inputs
        try:
            arguments: list[Any] = [*map(getitem, self.homes, self.keys)]
            if [*map(type, arguments)] != self.types or arguments[0].shape != self.shape or not x.numel():
                return None
            if [*map(_dtype, (*inputs, *self.tensors(arguments)))] != self.dtypes:
                return None
            if backends.resolve(self.kernels, x.device, x.dtype, self.name) != "cpu":
                return None
            arguments[self.before : self.before] = others
            return self.native(x, *arguments)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # the usual way refuses it in better words, or computes otherwise
            return None


def again(owner: nn.Module, key: Any, *inputs: Tensor) -> Any:
    """The result of the call that `prepare` kept under this key; None where the call is to go the usual way: where
    there is none, where something has changed, and where gradients, autocast or something that is to see the op are in
    force."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    watches = owner.__dict__.get(WATCHES)
    if watches is None or watches.owner() is not owner:
        return None
    prepared = watches.prepared.get(key)
    if prepared is None or any_autocast() or foreign_mode() is not None:
        return None
    if not plain_call(inputs) or observed(inputs):
        return None
    if not prepared.watch.unchanged(owner):
        watches.prepared.pop(key, None)  # it keeps alive what is no longer there
        return None
    return prepared(*inputs)


def preparable(owner: nn.Module) -> bool:
    """Whether a call that was just served may be kept; to be asked before `prepare`."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or owner.training:
        return False
    return not any_autocast()


def prepare(
    inputs: Sequence[Tensor],
    owner: nn.Module,
    key: Any,
    compositions: Sequence[Composition],
    name: str,
    kernels: str,
    sources: Iterable[Iterable[Source]],
    settings: Iterable[Source] = (),
    before: int = 0,
) -> None:
    """Keeps a call of a `preparable` module that was just served for `again`, where C++ served it.

    Args:
        inputs: the call's.
        owner: the module, and `key` which of its calls.
        compositions: the children that the call stood for; they and the owner have to be in evaluation.
        name: the native op.
        kernels: the module's choice of a backend.
        sources: where the arguments behind the first input are, in the op's order, but for the other inputs.
        settings: what else the call depended on, and is to be as it is.
        before: how many of the sources stand before the other inputs.
    """
    watches, x = watches_of(owner), inputs[0]
    if watches is None or backends.resolve(kernels, x.device, x.dtype, name) != "cpu":
        return
    kept = watches.prepared.get(key)
    if kept is not None and kept.dtypes[: len(inputs)] == [*map(_dtype, inputs)] and kept.watch.unchanged(owner):
        return  # C++ refuses these inputs every time
    arguments = [*chain.from_iterable(sources)]
    if any(isinstance(home, dict) and key not in home for home, key in arguments):
        return  # a wrapper keeps its parameters elsewhere
    kinds = [type(home[key]) for home, key in arguments]
    if kinds[0] not in _TENSORS or not _TYPES.issuperset((*kinds, *map(type, inputs))):
        return
    watch = Watch(owner, *compositions, settings=settings, evaluation=True)
    if not any(module.training for module in watch.modules):
        watches.prepared[key] = Prepared(watch, name, kernels, inputs, arguments, before)
