"""A fused inference call on the CPU that is made again.

Between a module's forward and C++ stand some twenty questions in Python: whether the children are what the composition
stands for, whether dropout is at work, what the weights are and whether they fit, which backend serves them. Their
answers are the same at every call until something changes. A call that was served by C++ is therefore kept as
`Prepared`: which op it was, and where its arguments were read. While the children are found unchanged, the next call
reads the arguments there and hands them to C++, which looks at all of them before it touches memory; what it refuses
goes the usual way, as does everything that `Prepared` does not know.
"""

from collections.abc import Sequence
from operator import attrgetter, getitem, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from . import backends
from .composition import Composition, child_at
from .dispatch.torch_internals import any_autocast, foreign_mode, observed, plain_call
from .watch import WATCHES, Watch, watches_of

Place = tuple[nn.Module, Any, tuple[Composition, ...]]
"""Which call of a module is kept: the module, a key among its calls, and the children that the call stands for."""

_TENSORS = frozenset({Tensor, nn.Parameter})
_TYPES = _TENSORS | {type(None), float, int}
_dtype = attrgetter("dtype")


class Prepared:
    """A call into C++ as it was made before, for modules in evaluation.

    watch: what has to be as it was.
    name: the op.
    inputs: those of that call.
    sources: a dictionary and a key in it, or a tuple and a place in it, of each argument that is no input. `before` of
        them stand between the first input and the others.
    """

    def __init__(
        self, watch: Watch, name: str, inputs: Sequence[Tensor], sources: Sequence[tuple[Any, Any]], before: int
    ) -> None:
        self.watch, self.name, self.before = watch, name, before
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
            if not x.is_cpu or not x.numel():  # which another backend serves
                return None
            arguments: list[Any] = [*map(getitem, self.homes, self.keys)]
            if [*map(type, arguments)] != self.types or arguments[0].shape != self.shape:
                return None
            if [*map(_dtype, (*inputs, *self.tensors(arguments)))] != self.dtypes:
                return None
            arguments[self.before : self.before] = others
            return self.native(x, *arguments)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # the usual way refuses it in better words, or computes otherwise
            return None


def again(owner: nn.Module, key: Any, *inputs: Tensor) -> Any:
    """The result of the call that `keep` kept under this key; None where the call is to go the usual way: where
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


def keep(place: Place, name: str, kernels: str, inputs: Sequence[Tensor], arguments: Sequence[Any]) -> None:
    """Keeps a call that was just served, for `again`, where C++ served it and the module and its children are in
    evaluation.

    The tensors among the arguments are found among the children's parameters, where the next call reads them. All other
    parameters are to stay as they are, and so are the settings of the compositions, in which the numbers are.

    Args:
        place: which call.
        name: the native op.
        kernels: the module's choice of a backend.
        inputs: the call's. Those behind the first follow one another in the op's arguments.
        arguments: all of the op's, the first input first.
    """
    owner, key, compositions = place
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or owner.training or any_autocast():
        return
    watches, x = watches_of(owner), inputs[0]
    if watches is None or backends.resolve(kernels, x.device, x.dtype, name) != "cpu":
        return
    kept = watches.prepared.get(key)
    if kept is not None and kept.dtypes[: len(inputs)] == [*map(_dtype, inputs)] and kept.watch.unchanged(owner):
        return  # C++ refuses these inputs every time
    children = {id(c): c for of in compositions for path in of.parts if (c := child_at(owner, path)) is not None}
    parameters = [(child._parameters, own) for child in children.values() for own in child._parameters]
    found = {id(value): (home, own) for home, own in parameters if (value := home[own]) is not None}
    if len(found) < sum(home[own] is not None for home, own in parameters):
        return  # two children share a parameter
    sources: list[tuple[Any, Any]] = []
    used, before = set(), 0
    for argument in arguments[1:]:
        if any(argument is given for given in inputs):
            before = len(sources) if argument is inputs[1] else before
        elif isinstance(argument, Tensor):
            if id(argument) not in found:
                return  # a wrapper keeps its parameters elsewhere
            sources.append(found[id(argument)])
            used.add(id(argument))
        else:
            sources.append(((argument,), 0))
    kinds = [type(home[own]) for home, own in sources]
    if kinds[0] not in _TENSORS or not _TYPES.issuperset((*kinds, *map(type, inputs))):
        return
    settings = [(home, own) for home, own in parameters if id(home[own]) not in used]
    watch = Watch(owner, *compositions, settings=settings, evaluation=True)
    if not any(module.training for module in watch.modules):
        watches.prepared[key] = Prepared(watch, name, inputs, sources, before)
