"""Running a kernel without what Triton does anew for every launch: binding, specialising, a key made of strings.

Triton compiles a kernel for what it sees of the arguments: the dtypes of pointers and whether they are aligned, whether
an integer is 1, divisible by 16 or wide, what is constexpr or None. A launch that equals an earlier one in all that, by
a key finer than Triton's, goes to the launcher of what was compiled then, with the arguments that Triton hands to it.
"""

import functools
import inspect
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

MOST = 4096  # launches that are kept of a kernel and types; sizes may change with every call

# How Triton's own run ends, in the versions that this is written after.
_LAUNCH = """
    kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata,
               knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())
"""


class _Compiled(NamedTuple):
    """A compiled kernel's launcher and what the launcher takes of it."""

    launcher: Callable[..., None]
    function: Any
    metadata: Any


class _Form:
    """Which of a kernel's arguments, tuples taken apart, are by their types tensors, descriptors and neither; what was
    compiled of it."""

    def __init__(self, types: tuple[type, ...]) -> None:
        self.tensors = [i for i, t in enumerate(types) if issubclass(t, Tensor)]
        self.descriptors = [i for i, t in enumerate(types) if issubclass(t, TensorDescriptor)]
        self.others = itemgetter(*[i for i, t in enumerate(types) if not issubclass(t, (Tensor, TensorDescriptor))])
        self.compiled: dict[tuple[Any, ...], _Compiled] = {}


class _Kernel:
    """A kernel, how its arguments are brought into its order, and their forms by their types."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel  # keeps the id, by which this is found, from another kernel
        self.ordered = itemgetter(*kernel.arg_names)
        self.forms: dict[tuple[type, ...], _Form] = {}


_kernels: dict[int, _Kernel] = {}


def run(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], num_warps: int, num_stages: int) -> None:
    """kernel[grid](..., num_warps=num_warps, num_stages=num_stages) with those arguments that the kernel takes."""
    known = _known(kernel)
    if known is None:
        taken = {name: arguments[name] for name in kernel.arg_names}
        kernel[grid](**taken, num_warps=num_warps, num_stages=num_stages)
        return
    values = known.ordered(arguments)
    flat: list[Any] = []
    for value in values:
        if isinstance(value, tuple):  # its class behind its fields tells them from arguments of their own
            flat += value
            flat.append(type(value))
        else:
            flat.append(value)
    form = known.forms.get(types := tuple(map(type, flat)))
    if form is None:
        form = known.forms[types] = _Form(types)
    active = driver.active
    device = active.get_current_device()
    debug, mode = knobs.runtime.debug, knobs.compilation.instrumentation_mode
    of_tensors: list[Any] = []
    for i in form.tensors:
        tensor = flat[i]
        of_tensors += tensor.dtype, tensor.data_ptr() % 16
    for i in form.descriptors:
        of_tensors += flat[i].base.dtype, *flat[i].block_shape
    key = (form.others(flat), device, num_warps, num_stages, debug, mode, *of_tensors)
    found = form.compiled.get(key)
    if found is not None:
        stream = active.get_current_stream(device)
        found.launcher(*(*grid, 1, 1)[:3], stream, found.function, found.metadata, None, None, None, *values)
        return
    compiled = kernel[grid](**dict(zip(kernel.arg_names, values)), num_warps=num_warps, num_stages=num_stages)
    if isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda":
        if len(form.compiled) >= MOST:
            form.compiled.clear()
        form.compiled[key] = _Compiled(compiled.run, compiled.function, compiled.packed_metadata)


def _known(kernel: Any) -> _Kernel | None:
    """None in the interpreter, and where somebody watches launches, as profilers do, or takes part in compiling."""
    runtime = knobs.runtime
    if (
        not isinstance(kernel, JITFunction)
        or kernel.pre_run_hooks
        or _calls(runtime.launch_enter_hook)
        or _calls(runtime.launch_exit_hook)
        or runtime.add_stages_inspection_hook is not None
        or not launches_as_known()
    ):
        return None
    known = _kernels.get(id(kernel))
    if known is None:
        known = _kernels[id(kernel)] = _Kernel(kernel)
    return known


def _calls(hook: Any) -> bool:
    """Whether a hook, which may be a chain of them, does anything."""
    return hook is not None and bool(getattr(hook, "calls", True))


@functools.cache
def launches_as_known() -> bool:
    """Whether this Triton calls launchers as `run` does."""
    try:
        source = inspect.getsource(JITFunction.run)
    except OSError:
        return False
    return "".join(_LAUNCH.split()) in "".join(source.split())
