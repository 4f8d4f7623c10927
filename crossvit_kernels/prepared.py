"""A fused inference call on the CPU that is made again.

Between a module's forward and C++ stand some twenty questions in Python: whether the children are what the composition
stands for, whether dropout is at work, what the weights are and whether they fit, which backend serves them. Their
answers are the same at every call until something changes. A call that was served by C++ is therefore kept as
`Prepared`: which op it was, its numbers, and where its tensors were read. While the children are found unchanged, the
numbers among their settings too, the next call reads the tensors there and hands all to C++, which looks at them before
it touches memory; what it refuses goes the usual way, as does everything that `Prepared` does not know.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, getitem, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from . import backends
from .composition import Composition, child_at, why_not
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
        tensors = [i for i, argument in enumerate(arguments) if isinstance(argument, Tensor)]
        self.tensors = itemgetter(*tensors, tensors[0])  # of one index alone it would give the tensor, and no tuple
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


def keep(
    place: Place,
    name: str,
    kernels: str,
    inputs: Sequence[Tensor],
    given: Sequence[Any],
    read: Callable[[], Sequence[Any]],
    modules: Iterable[nn.Module],
) -> None:
    """Keeps a call that was just served, for `again`, where C++ served it and the module and its children are in
    evaluation.

    The tensors among the arguments are found among the children's parameters, where the next call reads them. Numbers
    are kept as they are: they, and all parameters that are no argument, are to stay so. Another thread may have changed
    the module while the op ran: once it is watched, the arguments are read again, and have to be those of the call.

    Args:
        place: which call.
        name: the native op.
        kernels: the module's choice of a backend.
        inputs: the call's. Those behind the first follow one another in the op's arguments.
        given: all arguments of the call, the first input first.
        read: reads them again, from `modules`.
        modules: where they were read, which have to be the owner or children of its.
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
    among = {id(one) for one in inputs}
    others = [argument for argument in given if id(argument) not in among]
    before = next(i for i, argument in enumerate(given) if argument is inputs[1]) - 1 if len(inputs) > 1 else 0
    sources: list[tuple[Any, Any]] = []
    for argument in others:
        if isinstance(argument, Tensor):
            if id(argument) not in found:
                return  # a wrapper keeps its parameters elsewhere
            sources.append(found[id(argument)])
        else:
            sources.append(((argument,), 0))
    kinds = [type(home[own]) for home, own in sources]
    if kinds[0] not in _TENSORS or not _TYPES.issuperset((*kinds, *map(type, inputs))):
        return
    # A parameter that children share is read in one of them: it has to stay in all.
    times = Counter(id(home[own]) for home, own in parameters)
    read_there = {(id(home), own) for home, own in sources if times[id(home[own])] == 1}
    settings = [(home, own) for home, own in parameters if (id(home), own) not in read_there]
    watch = Watch(owner, *compositions, settings=settings, evaluation=True)
    watched = {id(module) for module in (owner, *watch.modules)}
    if not watched.issuperset(map(id, modules)) or any(module.training for module in watch.modules):
        return
    try:
        now = [*(home[own] for home, own in sources), *read()]
    except Exception:  # what was there is gone
        return
    then = [*others, *given]
    if len(now) != len(then) or not all(map(_same, now, then)):
        return
    if all(why_not(owner, composition) is None for composition in compositions):
        watches.prepared[key] = Prepared(watch, name, inputs, sources, before)


def _same(one: Any, other: Any) -> bool:
    """Whether they are one object, or numbers of one type and value."""
    return one is other or (type(one) is type(other) and not isinstance(one, Tensor) and one == other)
