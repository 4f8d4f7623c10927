"""Every private part of PyTorch that the package uses, and nothing else.

Each part is made by a function of its own, is tried when the package is imported, and has a public way that is taken
where it fails: `_either`. A new PyTorch in which one of them is gone or works otherwise makes a call some microseconds
dearer; it does not break it. `PRIVATE` says which parts work. The environment variable CROSSVIT_KERNELS_PUBLIC_TORCH
names parts, separated by commas, that are to fail ("all": every one), for tests.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils.module_tracker import ModuleTracker

_FORCED = frozenset(os.environ.get("CROSSVIT_KERNELS_PUBLIC_TORCH", "").split(","))

PRIVATE: dict[str, bool] = {}
"""{part: whether it works, so that the private way is taken}"""

_C: Any = torch._C
_ORDINARY = {Tensor, Parameter, type(None)}
_Way = TypeVar("_Way")


def _either(name: str, make: Callable[[], Any], works: Callable[[Any], object], public: _Way) -> _Way:
    """What `make` makes of private parts, if it works, else the public way; an exception is a no.

    Both run in a thread of their own, where no mode, autocast region or default device is in force that the package may
    be imported under.
    """
    found = [public]
    PRIVATE[name] = False

    def run() -> None:
        with suppress(Exception):
            made = make()
            PRIVATE[name] = bool(works(made))
            found.append(made)

    if not _FORCED & {name, "all"}:
        thread = Thread(target=run)
        thread.start()
        thread.join()
    return found[PRIVATE[name]]


def _key_set(*names: str) -> Any:
    """The dispatch keys of these names, as one set."""
    keys = _C.DispatchKeySet(getattr(_C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys | _C.DispatchKeySet(getattr(_C.DispatchKey, name))
    return keys


def _outside_and_in_vmap(look: Callable[[], bool]) -> list[bool]:
    """What `look` sees outside torch.vmap and inside it."""
    seen = [look()]

    def looking(x: Tensor) -> Tensor:
        seen.append(look())
        return x

    torch.vmap(looking)(torch.empty(1, 0))
    return seen


# observed(tensors): whether a mode, tracer, transform or tensor subclass is to see the op; where nothing is, the
# dispatcher would only hand the op on. Whatever watches adds its key to the thread's set. Publicly it cannot be known,
# and every call takes the way through the dispatcher. That costs 5 us, and under autocast the gradients of parameters
# are rounded to autocast's dtype, as PyTorch's own are.


def _make_observed() -> Callable[[Any], bool]:
    observers = _key_set("Python", "PythonDispatcher", "PreDispatch", "FuncTorchDynamicLayerFrontMode", "Functionalize")
    bits = (observers | _C.DispatchKeySet(_C._dispatch_key_parse("VmapMode"))).raw_repr()
    included = _C._dispatch_tls_local_include_set

    def observed(tensors: Any) -> bool:
        if included().raw_repr() & bits:
            return True
        return not _ORDINARY.issuperset(map(type, tensors))

    return observed


observed = _either(
    "observers",
    _make_observed,
    lambda observed: _outside_and_in_vmap(lambda: observed(())) == [False, True],
    lambda tensors: True,
)

# plain_call(inputs): whether no derivative of these is taken in a way that only plain PyTorch knows, in torch.func or
# in forward mode, and TorchScript does not trace. Publicly the tensors themselves are asked.


def _make_plain_call() -> Callable[[Any], bool]:
    peek = _C._functorch.peek_interpreter_stack
    return lambda inputs: peek() is None and forward_ad._current_level < 0 and not torch.jit.is_tracing()


def _plain_call_works(plain_call: Any) -> bool:
    with forward_ad.dual_level():
        inside = plain_call(())
    return not inside and _outside_and_in_vmap(lambda: plain_call(())) == [True, False]


def _is_plain(tensor: Tensor) -> bool:
    return torch.func.debug_unwrap(tensor) is tensor and forward_ad.unpack_dual(tensor).tangent is None


def _all_plain(inputs: Any) -> bool:
    return not torch.jit.is_tracing() and all(_is_plain(t) for t in inputs if isinstance(t, Tensor))


plain_call = _either("transforms", _make_plain_call, _plain_call_works, _all_plain)

# batched(grad_out): whether a gradient may stand for many, under torch.vmap and in autograd's is_grads_batched=True.
# Publicly it is known by having no memory of its own.


def _make_batched() -> Callable[[Tensor], bool]:
    vmap, included = _C._dispatch_key_parse("VmapMode"), _C._dispatch_tls_local_include_set
    peek = _C._functorch.peek_interpreter_stack
    return lambda grad_out: included().has(vmap) or peek() is not None


def _batched_works(batched: Any) -> bool:
    seen = _outside_and_in_vmap(lambda: batched(None))
    leaf = torch.zeros(1, requires_grad=True)
    out = leaf * 1
    out.register_hook(lambda grad: seen.append(batched(grad)))
    torch.autograd.grad(out, leaf, torch.ones(2, 1), is_grads_batched=True)
    return seen == [False, True, True]


def _has_no_memory(grad_out: Tensor) -> bool:
    try:
        grad_out.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return True
    return False


batched = _either("batches", _make_batched, _batched_works, _has_no_memory)

# any_requires_grad(*values): whether one of the arguments is a tensor that requires a gradient. Publicly they are asked
# one by one.

any_requires_grad: Callable[..., bool] = _either(
    "any_requires_grad",
    lambda: _C._any_requires_grad,
    lambda asked: asked(torch.empty(0, requires_grad=True), None, 1) and not asked(torch.empty(0), None, 1, "auto"),
    lambda *values: any(isinstance(t, Tensor) and t.requires_grad for t in values),
)

# any_autocast(): whether autocast is on for any type of device. Publicly each that the kernels know is asked.


def _any_autocast_works(any_autocast: Any) -> bool:
    with torch.autocast("cpu", torch.bfloat16):
        inside = any_autocast()
    return inside and not any_autocast()


any_autocast: Callable[[], bool] = _either(
    "any_autocast",
    lambda: _C._is_any_autocast_enabled,
    _any_autocast_works,
    lambda: torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"),
)

# without_autocast(): a context in which autocast casts nothing. Publicly it is autocast(enabled=False), once for each
# type of device.


def _without_autocast_works(without_autocast: Any) -> bool:
    with torch.autocast("cpu", torch.bfloat16), without_autocast():
        return not torch.is_autocast_enabled("cpu")


@contextmanager
def _disabled() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


without_autocast: Callable[[], Any] = _either(
    "without_autocast",
    lambda: partial(_C._ExcludeDispatchKeyGuard, _key_set("AutocastCPU", "AutocastCUDA")),
    _without_autocast_works,
    _disabled,
)

# below_autograd(op, keyset, *args): calls a dispatcher op without the autograd formula from which this is called, with
# the formula's keys. Publicly the keys are taken one by one, the first first, until those of autograd are gone.
# Autograd then sees the op's inside, where nothing is recorded, since gradients are off there or no input requires one.


def _make_below_autograd() -> Callable[..., Any]:
    below, behind = _C._AutoDispatchBelowAutograd, _C._after_autograd_keyset

    def below_autograd(op: Any, keyset: Any, *args: Any) -> Any:
        with below():
            return op.redispatch(keyset & behind, *args)

    return below_autograd


def _below_autograd_works(made: Any) -> bool:
    x = torch.zeros(1, requires_grad=True)
    with _C._AutoDispatchBelowAutograd():
        inside = x * 1
    autograd = _C.DispatchKeySet(_C.DispatchKey.AutogradCPU) & _C._after_autograd_keyset
    return not inside.requires_grad and not autograd.has(_C.DispatchKey.AutogradCPU)


def _key_by_key(op: Any, keyset: Any, *args: Any) -> Any:
    while "Autograd" in str(keyset):
        keyset = keyset.remove(keyset.highestPriorityTypeId())
    return op.redispatch(keyset, *args)


below_autograd = _either("below_autograd", _make_below_autograd, _below_autograd_works, _key_by_key)

# An op in plain PyTorch, for exports to ONNX and run_decompositions(). There is no public way for an exported program:
# where this fails, an export straight from a module takes plain PyTorch (`call.needs_reference`), and a program that
# was exported before has to come from a model with kernels="reference".

_decomp: Any = _either(
    "decompositions",
    lambda: import_module("torch._decomp"),
    lambda found: (
        callable(found.register_decomposition)
        and isinstance(found.meta_table, dict)
        and isinstance(found.decomposition_table, dict)
    ),
    None,
)
DECOMPOSES = PRIVATE["decompositions"]


def register_decomposition(op: Any, plain: Callable, fake: Callable) -> None:
    """Registers `plain` as what a dispatcher op consists of. FakeTensorMode would run it too, guards and all, where
    sizes are symbols, but for `fake` in its table."""
    if DECOMPOSES:
        _decomp.register_decomposition(op)(plain)
        _decomp.meta_table[op] = fake


def let_inductor_call(op: Any) -> None:
    """Tells inductor to call a dispatcher op that has a decomposition. Unless told so it raises, where CI is set, since
    it expects such an op to be decomposed.

    Called from the op's fake, because inductor traces with fakes before it lowers; only an inductor that is loaded is
    told, as loading it takes seconds. That is also why the list is looked for here and not at import; where inductor
    has no such list it needs no telling.
    """
    allowed = getattr(sys.modules.get("torch._inductor.lowering"), "FALLBACK_ALLOW_LIST", None)
    if DECOMPOSES and allowed is not None:
        allowed.add(op.name())


# constant_result(function): tells torch.compile that this function's result, for the same constant arguments, is the
# same; returns it. The public decorator sets an attribute, and imports the whole of torch.compile for it, which takes
# half as long as importing torch. What tries this reads the decorator's source.

_CONSTANT = "_dynamo_marked_constant"


def _mark(function: Callable) -> Callable:
    setattr(function, _CONSTANT, True)
    return function


def _marks_are_known(mark: Any) -> bool:
    source = Path(torch.__file__).with_name("_dynamo").joinpath("decorators.py").read_text("utf-8")
    return f"    fn.{_CONSTANT} = True" in source


constant_result = _either("constants", lambda: _mark, _marks_are_known, torch.compiler.assume_constant_result)

# schema_of(op): a native op's schema. Publicly it is read from the error of a call without arguments, which quotes it.


class Schema(NamedTuple):
    """What a native op takes, as (name, whether it is a tensor), and whether it returns one tensor alone."""

    arguments: list[tuple[str, bool]]
    single: bool


def _make_schema_of() -> Callable[[Any], Schema]:
    def schema_of(op: Any) -> Schema:
        schema = op._schema
        arguments = [(a.name, "Tensor" in str(a.type)) for a in schema.arguments]
        return Schema(arguments, str(schema.returns[0].type) == "Tensor")

    return schema_of


def _schema_of_error(op: Any) -> Schema:
    said = ""
    try:
        op()
    except RuntimeError as error:
        said = str(error)
    declared = re.search(r"Declaration: [\w:.]+\((?P<arguments>.*)\) -> (?P<returns>.*)", said)
    if declared is None:
        raise RuntimeError(f"a call of {op} without arguments does not say what it takes: {said}")
    fields = [field.partition("=")[0].split() for field in declared["arguments"].split(", ") if field != "*"]
    arguments = [(words[-1], words[0].startswith("Tensor")) for words in fields]
    returns = declared["returns"].strip("()").split()
    return Schema(arguments, returns[0] == "Tensor" and "," not in declared["returns"])


schema_of = _either(
    "schemas",
    _make_schema_of,
    lambda schema_of: schema_of(torch.ops.aten.mm.default).arguments == [("self", True), ("mat2", True)],
    _schema_of_error,
)

# What a call of a module runs, and who sees the calls of all modules and functions: hooks, modes. Publicly none of it
# can be known, and compositions are run as the modules that they consist of (`composition.why_not`).
#
#     watched_by_all()        which hook sees the calls of all modules, in words. PyTorch's module tracker, which the
#                             FLOP counter uses, only takes names down.
#     foreign_mode()          which mode sees the calls of PyTorch's functions, in words; a default device is none
#     hooked(module)          whether a hook sees the calls of this module
#     returns_seen(module)    whether a hook sees what this module returns
#     own_call(cls)           what a call of an instance runs, without torch.fx's wrapper around it, which changes
#                             nothing for tensors

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of a module
CALLS = ("_wrapped_call_impl", "_call_impl")  # nn.Module's methods, the first of which is its __call__
OVERRIDES = ("forward", "_call_impl", "_compiled_call_impl")  # on an instance, each changes what its call does
STAND_INS = "torch._subclasses."  # where the classes of tensors are that stand in for plain ones while a tracer runs
_UNKNOWN = "PyTorch's modules are not made as this package knows them"


class _Modules(NamedTuple):
    """The functions above, and the dictionaries of the hooks on all modules."""

    watched_by_all: Callable[[], str | None]
    foreign_mode: Callable[[], str | None]
    hooked: Callable[[nn.Module], bool]
    returns_seen: Callable[[nn.Module], bool]
    own_call: Callable[[type], Any]
    global_hooks: tuple[dict[int, Any], ...]


def _make_modules() -> _Modules:
    from torch.nn.modules import module as modules
    from torch.overrides import _get_current_function_mode_stack as function_modes
    from torch.utils._device import DeviceContext

    everywhere = tuple(getattr(modules, f"_global{name}") for name in HOOKS)
    any_mode = _C._len_torch_function_stack

    def watched_by_all() -> str | None:
        for hooks in everywhere:
            for hook in hooks.values():
                if not isinstance(getattr(hook, "__self__", None), ModuleTracker):
                    return f"a global hook, {getattr(hook, '__qualname__', hook)}, sees every module's call"
        return None

    def foreign_mode() -> str | None:
        if any_mode():
            for mode in function_modes():
                if not isinstance(mode, DeviceContext):
                    return f"a mode, {type(mode).__qualname__}, sees every call of a function"
        return None

    def hooked(module: nn.Module) -> bool:
        return bool(
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )

    def returns_seen(module: nn.Module) -> bool:
        return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks or any(everywhere))

    def own_call(cls: type) -> Any:
        call: Any = cls.__call__
        while getattr(call, "__globals__", {}).get("__name__") == "torch.fx._symbolic_trace":
            call = call.__wrapped__
        return call

    return _Modules(watched_by_all, foreign_mode, hooked, returns_seen, own_call, everywhere)


def _modules_work(made: Any) -> bool:
    from torch.overrides import TorchFunctionMode

    with TorchFunctionMode():
        modes_are_seen = made.foreign_mode() is not None
    bare, call = nn.Module().__dict__, nn.Module.__dict__
    return (
        modes_are_seen
        and made.foreign_mode() is None
        and all(isinstance(bare[name], dict) for name in ("_modules", *HOOKS))
        and all(name in call for name in CALLS)
        and all(isinstance(hooks, dict) for hooks in made.global_hooks)
    )


watched_by_all, foreign_mode, hooked, returns_seen, own_call, GLOBAL_HOOKS = _either(
    "modules",
    _make_modules,
    _modules_work,
    _Modules(lambda: _UNKNOWN, lambda: _UNKNOWN, lambda module: True, lambda module: True, lambda c: c.__call__, ()),
)
MODULES_UNKNOWN = None if PRIVATE["modules"] else _UNKNOWN

# tree_leaves(tree), tree_map_only(kind, function, tree): the tensors in nested tuples, lists and dictionaries, which a
# model takes and returns. Publicly only these three kinds are looked into, where PyTorch's own also knows named tuples,
# ordered dictionaries and what is registered with it.


class _Trees(NamedTuple):
    tree_leaves: Callable[[Any], list[Any]]
    tree_map_only: Callable[..., Any]


def _make_trees() -> _Trees:
    from torch.utils._pytree import tree_leaves, tree_map_only

    return _Trees(tree_leaves, tree_map_only)


def _trees_work(made: Any) -> bool:
    nested = {"a": [1, 2.0], "b": (3,)}
    found = made.tree_map_only(int, str, nested)
    return made.tree_leaves(nested) == [1, 2.0, 3] and found == {"a": ["1", 2.0], "b": ("3",)}


def _leaves(tree: Any) -> list[Any]:
    if not isinstance(tree, tuple | list | dict):
        return [tree]
    return [leaf for part in (tree.values() if isinstance(tree, dict) else tree) for leaf in _leaves(part)]


def _map_only(kind: Any, function: Callable, tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _map_only(kind, function, part) for key, part in tree.items()}
    if isinstance(tree, tuple | list):
        parts = [_map_only(kind, function, part) for part in tree]
        return parts if isinstance(tree, list) else tuple(parts)
    return function(tree) if isinstance(tree, kind) else tree


tree_leaves, tree_map_only = _either("trees", _make_trees, _trees_work, _Trees(_leaves, _map_only))
