"""The Triton kernels. Each file of `ops` is named after the op that it serves and holds its launchers:

    forward(call) -> (out, *saved)          out alone where the op saves nothing
    backward(call) -> the gradients that are needed

`call` has the arguments of the op's two dispatcher ops, `kernels` apart, by their names: `call.x`, `call.save`,
`call.grad_out`. Triton itself is imported with the first call.
"""

import importlib
import os
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# self_attention is PyTorch's scaled_dot_product_attention here, bicubic_resize its interpolate: their references.
OPS = ("cls_cross_attention", "cls_fusion", "layer_norm_linear", "layer_norm_mlp", "linear_residual", "patch_embed")
SERVED = frozenset([*OPS, *(f"{name}_backward" for name in OPS if name != "cls_fusion")])


def interprets() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors: the environment variable TRITON_INTERPRET."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def triton_kernel(name: str, function: str, given: Sequence[str]) -> Callable:
    """The launcher `function`, "forward" or "backward", of the op `name`, called with the arguments called `given`, on
    the device of the first."""
    found: Callable | None = None
    call: Any = namedtuple("call", given)  # type: ignore[misc]

    def run(*args: Any) -> Any:
        nonlocal found
        if found is None:
            found = getattr(importlib.import_module(f"{__name__}.ops.{name}"), function)
        tensor: Tensor = args[0]
        if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
            with torch.cuda.device(tensor.device):
                return found(call._make(args))
        return found(call._make(args))

    return run
