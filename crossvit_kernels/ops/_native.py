"""The C++ kernels, called with the arguments of the dispatcher ops."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .. import backends


def native_kernel(name: str, given: list[str], strided: Iterable[str]) -> Callable:
    """Calls crossvit_kernels_cpu::<name>, which picks its arguments from those called `given` by their names.

    The tensors called `strided` may lie in memory as they like, as far as two leading strides and contiguous rows can
    say; others are made contiguous.
    """
    if not backends.serves("cpu", name):
        return lambda *args: None  # never called: resolve() does not answer "cpu"
    native = getattr(torch.ops.crossvit_kernels_cpu, name).default
    arguments = [(given.index(a.name), "Tensor" in str(a.type), a.name in strided) for a in native._schema.arguments]

    def run(*args: Any) -> Any:
        values = []
        for i, is_tensor, may_be_strided in arguments:
            value = args[i]
            if (
                is_tensor
                and value is not None
                and not value.is_contiguous()
                and not (may_be_strided and value.stride(-1) == 1 and value.dim() <= 3)
            ):
                value = value.contiguous()
            values.append(value)
        return native(*values)

    if (
        name.endswith("_backward") and str(native._schema.returns[0].type) == "Tensor"
    ):  # an only gradient, not in a list
        return lambda *args: [run(*args)]
    return run
