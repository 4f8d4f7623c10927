"""The Triton kernels. Each file is named after the op that it serves and holds its kernels and their launcher:

    forward(*inputs, save) -> (out, *saved)            out alone where the op saves nothing
    backward(grad_out, *inputs, *saved, needs) -> the gradients that are needed

with the arguments of the op's two dispatcher ops, `kernels` apart. Triton itself is imported with the first call.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# self_attention is PyTorch's scaled_dot_product_attention here, bicubic_resize its interpolate: their references.
OPS = ("cls_cross_attention", "cls_fusion", "layer_norm_linear", "layer_norm_mlp", "linear_residual", "patch_embed")
SERVED = frozenset([*OPS, *(f"{name}_backward" for name in OPS if name != "cls_fusion")])


def interprets() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors: the environment variable TRITON_INTERPRET."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def triton_kernel(name: str, function: str) -> Callable:
    """The launcher `function`, "forward" or "backward", of the op `name`, on the device of its first argument."""
    found: Callable | None = None

    def run(*args: Any) -> Any:
        nonlocal found
        if found is None:
            found = getattr(importlib.import_module(f"{__name__}.ops.{name}"), function)
        tensor: Tensor = args[0]
        if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
            with torch.cuda.device(tensor.device):
                return found(*args)
        return found(*args)

    return run
