"""The kernels of C++ and CUDA, called with the arguments of the dispatcher ops."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .torch_internals import schema_of


def native_kernel(backend: str, name: str, given: list[str], strided: Iterable[str]) -> Callable:
    """Calls crossvit_kernels_<backend>::<name>, which picks its arguments from those called `given` by their names. It
    is looked up by the first call, since a library may be loaded late.

    PyTorch's setting of TF32 for products of float32 goes along where the op takes it: native code cannot read it.
    The tensors called `strided` may lie in memory as they like, as far as two leading strides and contiguous rows can
    say; others are made contiguous.
    """
    strided = frozenset(strided)
    native: Any = None
    order: list[int] = []  # where its arguments stand among those given
    tensors: list[tuple[int, bool]] = []  # which of its arguments are tensors, and whether they may be strided
    single = asks_tf32 = False

    def look_up() -> None:
        nonlocal native, order, tensors, single, asks_tf32
        found = getattr(getattr(torch.ops, f"crossvit_kernels_{backend}"), name).default
        schema = schema_of(found)
        names = [argument for argument, _ in schema.arguments]
        asks_tf32 = names[-1] == "tf32"
        order = [given.index(argument) for argument in names[: -1 if asks_tf32 else None]]
        tensors = [(i, argument in strided) for i, (argument, tensor) in enumerate(schema.arguments) if tensor]
        single = name.endswith("_backward") and schema.single  # a backward's only gradient comes without a list
        native = found  # last: another thread may be about to call it

    def run(*args: Any) -> Any:
        if native is None:
            look_up()
        values = [args[i] for i in order]
        for i, may_be_strided in tensors:
            value = values[i]
            if (
                value is not None
                and not value.is_contiguous()
                and not (may_be_strided and value.stride(-1) == 1 and value.dim() <= 3)
            ):
                values[i] = value.contiguous()
        if asks_tf32:
            values.append(torch.backends.cuda.matmul.allow_tf32)
        try:
            return [native(*values)] if single else native(*values)
        except RuntimeError as error:  # PyTorch's C interface hands on what an error says, not which kind it is
            if backend == "cuda" and "out of memory" in str(error):
                raise torch.OutOfMemoryError(str(error)) from error
            raise

    return run
