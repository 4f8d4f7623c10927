"""A pre-norm transformer block in inference on the CPU, in one call into C++."""

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..dispatch.torch_internals import any_autocast, observed, plain_call

NAME = "transformer_block"


def transformer_block(x: Tensor, *weights: Any, kernels: str) -> Tensor | None:
    """The result of layer_norm_linear, self_attention, linear_residual and layer_norm_mlp one after another, to the
    bit, without Python between them; None where the ops themselves are to be called. That is so where gradients are
    taken, under autocast, where something is to see each op, on another backend, and where an argument is not what it
    should be.

    Args:
        x: (B, N, D).
        weights: norm1's weight, bias, eps; the weight and bias of q, k and v together; the number of heads; the
            projection's weight, bias and scale; norm2's weight, bias, eps; the weight and bias of both Linears of the
            MLP; its scale. The scales as `linear_residual` takes them.
        kernels: the backend, see `crossvit_kernels.backends`.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or any_autocast():
        return None
    tensors = [x, *(w for w in weights if isinstance(w, Tensor))]
    if not plain_call(tensors) or observed(tensors):
        return None
    if x.device.type != "cpu" or backends.resolve(kernels, x.device, x.dtype, NAME) != "cpu":
        return None
    try:
        return torch.ops.crossvit_kernels_cpu.transformer_block.default(x, *weights)
    except NotImplementedError:  # a sparse weight, of which the dispatcher has no kernel
        return None
