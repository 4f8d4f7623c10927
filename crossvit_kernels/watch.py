"""Whether a composition may be fused now, asked at every call: `fuses` is `why_not` in its quick form.

What was looked at when nothing stood against a composition is remembered in a `Watch` and found unchanged in a few
microseconds.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import call, contains, is_, itemgetter
from typing import Any

import torch
from torch import nn

from .composition import ENTRY, FUNCTIONS, KERNELS, METHODS, Composition, child_at, why_not
from .dispatch.torch_internals import GLOBAL_HOOKS, HOOKS, OVERRIDES, foreign_mode

WATCHES = "_crossvit_watches"
_attribute: Any = getattr
_get: Any = dict.get


def fuses(owner: nn.Module, composition: Any, *arguments: Any) -> bool:
    """Whether nothing stands against it now: `why_not` in its quick form.

    composition: a Composition or, with the `arguments` for it, a Family.
    """
    if torch.compiler.is_compiling():
        return why_not(owner, composition.make(*arguments) if arguments else composition) is None
    if arguments:
        composition = composition.known(*arguments)
    watches = watches_of(owner)
    if watches is None:
        return False
    if watches.still(owner, composition) is not None:
        return True
    if why_not(owner, composition) is not None:
        return False
    return watches.remember(owner, composition, (composition,))


def fuses_each(owner: nn.Module, compositions: tuple[Composition, ...]) -> Sequence[bool]:
    """`fuses` of each of them; where nothing stands against any, at the price of little more than one."""
    if torch.compiler.is_compiling():
        return [why_not(owner, composition) is None for composition in compositions]
    watches = watches_of(owner)
    if watches is None:
        return [False] * len(compositions)
    if (watch := watches.still(owner, compositions)) is not None:
        return watch.all
    each = [fuses(owner, composition) for composition in compositions]
    if all(each):
        watches.remember(owner, compositions, compositions)
    return each


def watches_of(owner: nn.Module) -> "Watches | None":
    """What is remembered of `owner`; None where a mode is in force under which nothing fuses."""
    if foreign_mode() is not None:
        return None
    watches = owner.__dict__.get(WATCHES)
    if watches is None or watches.owner() is not owner:  # none, or those of the module that this one is a copy of
        watches = owner.__dict__[WATCHES] = Watches(owner)
    return watches


def forget(owner: nn.Module) -> None:
    """Removes what `fuses` remembers of `owner`."""
    owner.__dict__.pop(WATCHES, None)


class Watch:
    """The children of compositions as they were when nothing stood against these.

    The owner's own dictionary, in which it is kept, is none of what it holds: that would be a cycle, and a model that
    is dropped is to free its memory at once.

    settings: entries of dictionaries that are looked at besides. evaluation: whether the owner's and the children's
    `training` is, and where the children have their parameters.
    """

    def __init__(
        self,
        owner: nn.Module,
        *compositions: Composition,
        settings: Iterable[tuple[dict[str, Any], str]] = (),
        evaluation: bool = False,
    ) -> None:
        modules: dict[int, nn.Module] = {}
        containers: list[dict[str, Any]] = []
        methods: list[tuple[type, str]] = []
        self.all = (True,) * len(compositions)
        state, children = _State(owner.__dict__), {}
        state.add(owner.__dict__, "_modules")
        for home, name, _ in FUNCTIONS:
            state.add(home, name)
        for composition in compositions:
            for name in (KERNELS if composition.entry else "kernels", *composition.settings):
                state.add(owner.__dict__, name)
            for parent, name in _ways(owner, composition.parts):
                state.add(parent.__dict__, "_modules")
                children[id(parent._modules), name] = (parent._modules, name, parent._modules.get(name))
                if parent._modules.get(name) is None:
                    state.add(parent.__dict__, name)
            for path, expected in composition.parts.items():
                child = child_at(owner, path)
                if child is not None:
                    modules[id(child)] = child
                    if child._modules:
                        containers.append(child._modules)
                    for name in (*OVERRIDES, *HOOKS, *expected.settings):
                        state.add(child.__dict__, name)
            if composition.entry is not None:
                methods.append(composition.entry)
        for home, name in settings:
            state.add(home, name)
        for module in (owner, *modules.values()) if evaluation else ():
            state.add(module.__dict__, "training")
            state.add(module.__dict__, "_parameters")
        classes = dict.fromkeys(map(type, modules.values()))
        methods += [(c, name) for c in classes for name in METHODS]
        methods += [c.__dict__[ENTRY] for c in classes if ENTRY in c.__dict__]
        self.homes, self.getters = state.present()
        self.values = [*map(call, self.getters, self.homes)]
        self.absent = state.absent()
        self.own = state.own(owner.__dict__)
        self.places = [tuple(place[i] for place in children.values()) for i in range(3)]
        self.modules, self.types = tuple(modules.values()), [*map(type, modules.values())]
        self.dictionaries = tuple(map(vars, self.modules))
        self.containers, self.counts = tuple(containers), [*map(len, containers)]
        self.hooks = (*GLOBAL_HOOKS, *(getattr(child, name) for child in self.modules for name in HOOKS))
        self.classes, self.methods = (tuple(method[i] for method in dict.fromkeys(methods)) for i in range(2))
        self.functions = tuple(map(_attribute, self.classes, self.methods))

    def unchanged(self, owner: nn.Module) -> bool:
        """Whether all of it is as it was: the same children, of the same classes, with the same settings and methods,
        and no hooks."""
        homes, names, children = self.places
        own, values, absent = self.own
        try:
            # The tuples are equal where their elements are the same objects, which is looked at first, or equal ones:
            # a dictionary of hooks that was replaced by another empty one, say. `hooks` and the next hook tell those.
            return (
                all(map(is_, map(_get, homes, names), children))
                and [*map(call, self.getters, self.homes)] == self.values
                and owner.__dict__.keys().isdisjoint(absent)
                and own(owner.__dict__) == values
                and not any(map(contains, *self.absent))
                and all(map(is_, map(vars, self.modules), self.dictionaries))
                and [*map(type, self.modules)] == self.types
                and not any(self.hooks)
                and [*map(len, self.containers)] == self.counts
                and all(map(is_, map(_attribute, self.classes, self.methods), self.functions))
            )
        except Exception:  # an entry is gone, or what stands there now cannot be compared
            return False


class _State:
    """Entries of dictionaries, gathered to be read again quickly: those of one dictionary together, and those of the
    owner's apart."""

    def __init__(self, owners: dict[str, Any]) -> None:
        self.entries: dict[int, tuple[dict[str, Any], dict[str, None]]] = {}
        self.owners = id(owners)

    def add(self, home: dict[str, Any], name: str) -> None:
        """One more entry, which may be missing."""
        self.entries.setdefault(id(home), (home, {}))[1][name] = None

    def present(self) -> tuple[tuple[dict[str, Any], ...], tuple[Callable[[Any], Any], ...]]:
        """The dictionaries, and for each a function that reads all its entries that are there now."""
        found = [(home, [name for name in names if name in home]) for home, names in self._others()]
        found = [(home, names) for home, names in found if names]
        return tuple(home for home, _ in found), tuple(itemgetter(*names) for _, names in found)

    def absent(self) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...]]:
        """The dictionaries and the names of the entries that are missing now."""
        missing = [(home, name) for home, names in self._others() for name in names if name not in home]
        return tuple(home for home, _ in missing), tuple(name for _, name in missing)

    def own(self, owners: dict[str, Any]) -> tuple[Callable[[Any], Any], Any, tuple[str, ...]]:
        """Of the owner's dictionary: what reads the entries that are there now, what it reads, and the names of those
        that are missing."""
        names = self.entries[self.owners][1]
        getter = itemgetter(*(name for name in names if name in owners))
        return getter, getter(owners), tuple(name for name in names if name not in owners)

    def _others(self) -> list[tuple[dict[str, Any], dict[str, None]]]:
        return [entry for home, entry in self.entries.items() if home != self.owners]


class Watches(dict):
    """{composition, or several: what is remembered}, of one module, `owner`; a copy, or a file, of it has nothing."""

    def __init__(self, owner: nn.Module | None = None) -> None:
        super().__init__()
        self.prepared: dict[Any, Any] = {}  # see prepared.py
        self.owner: Any = (lambda: None) if owner is None else weakref.ref(owner)

    def still(self, owner: nn.Module, key: Any) -> Watch | None:
        """What is remembered under `key`, where it is unchanged; else it is dropped, as it keeps alive what is gone."""
        watch: Watch | None = self.get(key)
        if watch is not None and not watch.unchanged(owner):
            self.pop(key, None)
            return None
        return watch

    def remember(self, owner: nn.Module, key: Any, compositions: tuple[Composition, ...]) -> bool:
        """Under `key`, that nothing stood against these a moment ago; False where something does by now, since another
        thread changes the module."""
        watch = Watch(owner, *compositions)
        if any(why_not(owner, composition) is not None for composition in compositions):
            return False
        self[key] = watch
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> "Watches":
        return Watches()

    def __reduce__(self) -> Any:
        return Watches, ()


def _ways(owner: nn.Module, paths: Iterable[str]) -> Iterator[tuple[nn.Module, str]]:
    """(parent, name) of every module on the way to each of `paths`, each once."""
    seen: set[str] = set()
    for path in paths:
        names = path.split(".")
        for depth in range(len(names)):
            way = ".".join(names[: depth + 1])
            parent = child_at(owner, ".".join(names[:depth]))
            if way not in seen and parent is not None:
                seen.add(way)
                yield parent, names[depth]
