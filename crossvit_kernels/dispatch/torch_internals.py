"""Every private part of PyTorch that the package uses, and nothing else.

Each part stands here with what it is used for, a probe that is run when the package is imported, and the public way
that is taken where the probe fails. A new PyTorch in which one of them is gone or works otherwise makes a call some
microseconds dearer; it does not break it. `PRIVATE` says which probes passed. The environment variable
CROSSVIT_KERNELS_PUBLIC_TORCH names probes, separated by commas, that are to fail ("all": every one), for tests.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils.module_tracker import ModuleTracker

_FORCED = frozenset(os.environ.get("CROSSVIT_KERNELS_PUBLIC_TORCH", "").split(","))

PRIVATE: dict[str, bool] = {}
"""{probe: whether it passed, so that the private way is taken}"""


def _probe(name: str, works: Callable[[], bool]) -> bool:
    """Runs a probe and keeps its answer; an exception is a no. It runs in a thread of its own, where no mode, autocast
    region or default device is in force that the package may be imported under."""
    PRIVATE[name] = False

    def run() -> None:
        with suppress(Exception):
            PRIVATE[name] = bool(works())

    if not _FORCED & {name, "all"}:
        thread = Thread(target=run)
        thread.start()
        thread.join()
    return PRIVATE[name]


_C: Any = torch._C
_ORDINARY = {Tensor, Parameter, type(None)}


def _key_set(*names: str) -> Any:
    """The dispatch keys of these names, as one set."""
    keys = _C.DispatchKeySet(getattr(_C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys | _C.DispatchKeySet(getattr(_C.DispatchKey, name))
    return keys


# Whether something watches the dispatcher: a mode, a tracer or a transform adds its key to the thread's set. Publicly
# it cannot be known, and every call takes the way through the dispatcher. That costs 5 us, and under autocast the
# gradients of parameters are rounded to autocast's dtype, as PyTorch's own are.


def _observers() -> int:
    """The keys of everything that can watch the dispatcher, as bits."""
    observers = _key_set("Python", "PythonDispatcher", "PreDispatch", "FuncTorchDynamicLayerFrontMode", "Functionalize")
    return (observers | _C.DispatchKeySet(_C._dispatch_key_parse("VmapMode"))).raw_repr()


def _observers_are_seen() -> bool:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(_C._dispatch_tls_local_include_set().raw_repr() & _observers())
        return x

    look(torch.empty(0))
    torch.vmap(look)(torch.empty(1, 0))
    return not seen[0] and bool(seen[1])


if _probe("observers", _observers_are_seen):
    _OBSERVERS = _observers()
    _included = _C._dispatch_tls_local_include_set

    def observed(tensors: Iterable[Tensor | None]) -> bool:
        """Whether a mode, tracer, transform or tensor subclass is to see the op. Where nothing is, the dispatcher would
        only hand the op on."""
        if _included().raw_repr() & _OBSERVERS:
            return True
        return not _ORDINARY.issuperset(map(type, tensors))
else:

    def observed(tensors: Iterable[Tensor | None]) -> bool:
        """Whether a mode, tracer, transform or tensor subclass is to see the op: perhaps."""
        return True


# Whether derivatives are taken in ways that only plain PyTorch knows: torch.func, forward mode. Publicly the tensors
# themselves are asked.


def _transforms_are_seen() -> bool:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(_C._functorch.peek_interpreter_stack() is not None)
        return x

    look(torch.empty(0))
    torch.vmap(look)(torch.empty(1, 0))
    with forward_ad.dual_level():
        inside = forward_ad._current_level
    return seen == [False, True] and forward_ad._current_level < 0 <= inside


if _probe("transforms", _transforms_are_seen):
    _peek = _C._functorch.peek_interpreter_stack

    def plain_call(inputs: Iterable[Any]) -> bool:
        """Whether no derivative of these is taken in a way that only plain PyTorch knows, and TorchScript does not
        trace."""
        return _peek() is None and forward_ad._current_level < 0 and not torch.jit.is_tracing()
else:

    def plain_call(inputs: Iterable[Any]) -> bool:
        """Whether no derivative of these is taken in a way that only plain PyTorch knows, and TorchScript does not
        trace."""
        if torch.jit.is_tracing():
            return False
        return not any(isinstance(t, Tensor) and _transformed(t) for t in inputs)

    def _transformed(tensor: Tensor) -> bool:
        return torch.func.debug_unwrap(tensor) is not tensor or forward_ad.unpack_dual(tensor).tangent is not None


# Whether a gradient stands for many at once. Publicly it is known by having no memory of its own.


def _batches_are_seen() -> bool:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(_under_vmap())
        return x

    look(torch.empty(0))
    torch.vmap(look)(torch.empty(1, 0))
    leaf = torch.zeros(1, requires_grad=True)
    out = leaf * 1
    out.register_hook(lambda grad: seen.append(_under_vmap()))
    torch.autograd.grad(out, leaf, torch.ones(2, 1), is_grads_batched=True)
    return seen == [False, True, True]


def _under_vmap() -> bool:
    vmap = _C._dispatch_key_parse("VmapMode")
    return _C._dispatch_tls_local_include_set().has(vmap) or _C._functorch.peek_interpreter_stack() is not None


if _probe("batches", _batches_are_seen):

    def batched(grad_out: Tensor) -> bool:
        """Whether a gradient may stand for many: under torch.vmap, and in autograd's is_grads_batched=True."""
        return _under_vmap()
else:

    def batched(grad_out: Tensor) -> bool:
        """Whether a gradient stands for many: under torch.vmap, and in autograd's is_grads_batched=True."""
        try:
            grad_out.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return True
        return False


# Whether a call has to be differentiated. Publicly the arguments are asked one by one.

if _probe(
    "any_requires_grad",
    lambda: (
        _C._any_requires_grad(torch.empty(0, requires_grad=True), None, 1)
        and not _C._any_requires_grad(torch.empty(0), None, 1, "auto")
    ),
):
    any_requires_grad: Callable[..., bool] = _C._any_requires_grad
else:

    def any_requires_grad(*values: Any) -> bool:
        """Whether one of the arguments is a tensor that requires a gradient."""
        return any(isinstance(t, Tensor) and t.requires_grad for t in values)


# Whether autocast is on for any type of device. Publicly each that the kernels know is asked.


def _autocast_is_seen() -> bool:
    before = _C._is_any_autocast_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        inside = _C._is_any_autocast_enabled()
    return inside and not before


if _probe("any_autocast", _autocast_is_seen):
    any_autocast: Callable[[], bool] = _C._is_any_autocast_enabled
else:

    def any_autocast() -> bool:
        """Whether autocast is on for a CPU or a GPU."""
        return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


# A region in which autocast casts nothing more. Publicly it is autocast(enabled=False), once for each type of device.


def _autocast_is_left() -> bool:
    with torch.autocast("cpu", torch.bfloat16), _C._ExcludeDispatchKeyGuard(_key_set("AutocastCPU", "AutocastCUDA")):
        return not torch.is_autocast_enabled("cpu")


if _probe("without_autocast", _autocast_is_left):
    _AUTOCAST = _key_set("AutocastCPU", "AutocastCUDA")
    _exclude = _C._ExcludeDispatchKeyGuard

    def without_autocast() -> Any:
        """A context in which autocast casts nothing."""
        return _exclude(_AUTOCAST)
else:

    @contextmanager
    def _disabled() -> Iterator[None]:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield

    def without_autocast() -> Any:
        """A context in which autocast casts nothing."""
        return _disabled()


# The rest of the way of a dispatcher op, behind its autograd formula. Publicly the keys are taken one by one, the first
# first, from the set that the formula was called with, until those of autograd are gone. Autograd then sees the op's
# inside, where nothing is recorded, since gradients are off there or no input requires one.


def _autograd_is_left() -> bool:
    x = torch.zeros(1, requires_grad=True)
    with _C._AutoDispatchBelowAutograd():
        inside = x * 1
    autograd = _C.DispatchKeySet(_C.DispatchKey.AutogradCPU) & _C._after_autograd_keyset
    return not inside.requires_grad and not autograd.has(_C.DispatchKey.AutogradCPU)


if _probe("below_autograd", _autograd_is_left):
    _BelowAutograd, _BEHIND = _C._AutoDispatchBelowAutograd, _C._after_autograd_keyset

    def below_autograd(op: Any, keyset: Any, *args: Any) -> Any:
        """Calls a dispatcher op without the autograd formula from which this is called, with the formula's keys."""
        with _BelowAutograd():
            return op.redispatch(keyset & _BEHIND, *args)
else:

    def below_autograd(op: Any, keyset: Any, *args: Any) -> Any:
        """Calls a dispatcher op without the autograd formula from which this is called, with the formula's keys."""
        while "Autograd" in str(keyset):
            keyset = keyset.remove(keyset.highestPriorityTypeId())
        return op.redispatch(keyset, *args)


# An op in plain PyTorch, for exports to ONNX and run_decompositions(). There is no public way for an exported program:
# where the probe fails, an export straight from a module takes plain PyTorch (`call.needs_reference`), and a program
# that was exported before has to come from a model with kernels="reference".


def _decompositions_are_known() -> bool:
    from torch._decomp import decomposition_table, meta_table, register_decomposition

    return callable(register_decomposition) and isinstance(meta_table, dict) and isinstance(decomposition_table, dict)


DECOMPOSES = _probe("decompositions", _decompositions_are_known)


def register_decomposition(op: Any, plain: Callable, fake: Callable) -> None:
    """Registers `plain` as what a dispatcher op consists of. FakeTensorMode would run it too, guards and all, where
    sizes are symbols, but for `fake` in its table."""
    if DECOMPOSES:
        from torch import _decomp

        _decomp.register_decomposition(op)(plain)
        _decomp.meta_table[op] = fake


def let_inductor_call(op: Any) -> None:
    """Tells inductor to call a dispatcher op that has a decomposition. Unless told so it raises, where CI is set, since
    it expects such an op to be decomposed.

    Called from the op's fake, because inductor traces with fakes before it lowers; only an inductor that is loaded is
    told, as loading it takes seconds. That is also why the probe is here and not at import; where inductor has no such
    list it needs no telling.
    """
    allowed = getattr(sys.modules.get("torch._inductor.lowering"), "FALLBACK_ALLOW_LIST", None)
    if DECOMPOSES and allowed is not None:
        allowed.add(op.name())


# A function whose result torch.compile may take for a constant. The public decorator sets an attribute, and imports the
# whole of torch.compile for it, which takes half as long as importing torch. The probe reads the decorator's source.

_CONSTANT = "_dynamo_marked_constant"


def _constants_are_marked() -> bool:
    source = Path(torch.__file__).with_name("_dynamo").joinpath("decorators.py").read_text("utf-8")
    return f"    fn.{_CONSTANT} = True" in source


if _probe("constants", _constants_are_marked):

    def constant_result(function: Callable) -> Callable:
        """Tells torch.compile that this function's result, for the same constant arguments, is the same; returns it."""
        setattr(function, _CONSTANT, True)
        return function
else:
    constant_result = torch.compiler.assume_constant_result


# A native op's schema. Publicly it is read from the error of a call without arguments, which quotes it.


class Schema(NamedTuple):
    """What a native op takes, as (name, whether it is a tensor), and whether it returns one tensor alone."""

    arguments: list[tuple[str, bool]]
    single: bool


if _probe("schemas", lambda: [a.name for a in torch.ops.aten.mm.default._schema.arguments] == ["self", "mat2"]):

    def schema_of(op: Any) -> Schema:
        """The schema of a native op."""
        schema = op._schema
        arguments = [(a.name, "Tensor" in str(a.type)) for a in schema.arguments]
        return Schema(arguments, str(schema.returns[0].type) == "Tensor")
else:

    def schema_of(op: Any) -> Schema:
        """The schema of a native op."""
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


# What a call of a module runs, and who sees the calls of all modules and functions: hooks, modes. Publicly none of it
# can be known, and compositions are run as the modules that they consist of (`composition.why_not`).

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of a module
CALLS = ("_wrapped_call_impl", "_call_impl")  # nn.Module's methods, the first of which is its __call__
OVERRIDES = ("forward", "_call_impl", "_compiled_call_impl")  # on an instance, each changes what its call does
STAND_INS = "torch._subclasses."  # where the classes of tensors are that stand in for plain ones while a tracer runs


def _modules_are_known() -> bool:
    from torch.nn.modules import module
    from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    with TorchFunctionMode() as mode:
        modes_are_seen = _C._len_torch_function_stack() == 1 and [*_get_current_function_mode_stack()] == [mode]
    bare, call = nn.Module().__dict__, nn.Module.__dict__
    return (
        modes_are_seen
        and _C._len_torch_function_stack() == 0
        and isinstance(DeviceContext, type)
        and all(isinstance(bare[name], dict) for name in ("_modules", *HOOKS))
        and all(name in call for name in CALLS)
        and all(isinstance(getattr(module, name), dict) for name in _GLOBAL)
    )


_GLOBAL = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")

MODULES_UNKNOWN: str | None = None
GLOBAL_HOOKS: tuple[dict[int, Any], ...] = ()

if _probe("modules", _modules_are_known):
    from torch.nn.modules import module as _module
    from torch.overrides import _get_current_function_mode_stack as _function_modes
    from torch.utils._device import DeviceContext as _DefaultDevice

    GLOBAL_HOOKS = tuple(getattr(_module, name) for name in _GLOBAL)
    _any_function_mode = _C._len_torch_function_stack

    def watched_by_all() -> str | None:
        """Which hook sees the calls of all modules, in words. PyTorch's module tracker, which the FLOP counter uses,
        only takes names down."""
        for hooks in GLOBAL_HOOKS:
            for hook in hooks.values():
                if not isinstance(getattr(hook, "__self__", None), ModuleTracker):
                    return f"a global hook, {getattr(hook, '__qualname__', hook)}, sees every module's call"
        return None

    def foreign_mode() -> str | None:
        """Which mode sees the calls of PyTorch's functions, in words; a default device is none that does."""
        if _any_function_mode():
            for mode in _function_modes():
                if not isinstance(mode, _DefaultDevice):
                    return f"a mode, {type(mode).__qualname__}, sees every call of a function"
        return None

    def hooked(module: nn.Module) -> bool:
        """Whether a hook sees the calls of this module."""
        return bool(
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )

    def returns_seen(module: nn.Module) -> bool:
        """Whether a hook sees what this module returns."""
        return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks or any(GLOBAL_HOOKS))

    def own_call(cls: type) -> Any:
        """What a call of an instance runs, without torch.fx's wrapper around it, which changes nothing for tensors."""
        call: Any = cls.__call__
        while getattr(call, "__globals__", {}).get("__name__") == "torch.fx._symbolic_trace":
            call = call.__wrapped__
        return call
else:
    MODULES_UNKNOWN = "PyTorch's modules are not made as this package knows them"

    def watched_by_all() -> str | None:
        """Which hook sees the calls of all modules, in words: perhaps one."""
        return MODULES_UNKNOWN

    def foreign_mode() -> str | None:
        """Which mode sees the calls of PyTorch's functions, in words: perhaps one."""
        return MODULES_UNKNOWN

    def hooked(module: nn.Module) -> bool:
        """Whether a hook sees the calls of this module: perhaps."""
        return True

    def returns_seen(module: nn.Module) -> bool:
        """Whether a hook sees what this module returns: perhaps."""
        return True

    def own_call(cls: type) -> Any:
        """What a call of an instance runs."""
        return cls.__call__


# The tensors in nested tuples, lists and dictionaries, which a model takes and returns. Publicly only these three kinds
# are looked into, where PyTorch's own also knows named tuples, ordered dictionaries and what is registered with it.


def _trees_are_known() -> bool:
    from torch.utils._pytree import tree_leaves, tree_map_only

    nested = {"a": [1, 2.0], "b": (3,)}
    return tree_leaves(nested) == [1, 2.0, 3] and tree_map_only(int, str, nested) == {"a": ["1", 2.0], "b": ("3",)}


if _probe("trees", _trees_are_known):
    from torch.utils import _pytree

    tree_leaves: Callable[[Any], list[Any]] = _pytree.tree_leaves
    tree_map_only: Callable[..., Any] = _pytree.tree_map_only
else:

    def tree_leaves(tree: Any) -> list[Any]:
        """Everything in a nested value that is no tuple, list or dictionary itself."""
        if not isinstance(tree, tuple | list | dict):
            return [tree]
        return [leaf for part in (tree.values() if isinstance(tree, dict) else tree) for leaf in tree_leaves(part)]

    def tree_map_only(kind: Any, function: Callable, tree: Any) -> Any:
        """The nested value with `function` of every leaf of this kind in its place."""
        if isinstance(tree, dict):
            return {key: tree_map_only(kind, function, part) for key, part in tree.items()}
        if isinstance(tree, tuple | list):
            parts = [tree_map_only(kind, function, part) for part in tree]
            return parts if isinstance(tree, list) else tuple(parts)
        return function(tree) if isinstance(tree, kind) else tree
