"""A call of a registered op from its public function: through the dispatcher, or, where nothing watches the dispatcher,
past it to what the op ends in."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .autograd import Differentiable
from .op import Op
from .torch_internals import (
    DECOMPOSES,
    any_autocast,
    any_requires_grad,
    constant_result,
    observed,
    plain_call,
    without_autocast,
)

# Its answer depends on constants of a traced graph alone, so torch.compile need not look inside.
constant_result(backends.resolve)


def needs_reference(op: Op, inputs: Sequence[Any], kernels: str, dtype: torch.dtype | None = None) -> bool:
    """Whether the op's plain PyTorch is to be called instead: where the backend is the reference, and where derivatives
    are taken in ways that only plain PyTorch knows (torch.func, forward mode) or TorchScript traces. `dtype` stands for
    the one that the op computes in, where that is not its `computes_in`'s."""
    compute = inputs[op.spec.compute]
    if backends.resolve(kernels, compute.device, dtype or compute.dtype, op.spec.name) == "reference":
        return True
    if not DECOMPOSES and torch.onnx.is_in_onnx_export():
        return True
    return not torch.compiler.is_compiling() and not plain_call(inputs)


def call(op: Op, inputs: Sequence[Any], kernels: str) -> Tensor:
    """The op of validated inputs."""
    spec = op.spec
    if torch.compiler.is_compiling():
        save = torch.is_grad_enabled() and any(inputs[i] is not None and inputs[i].requires_grad for i in spec.tensors)
        result = op.dispatched(*inputs, save, kernels)
    else:
        save = torch.is_grad_enabled() and any_requires_grad(*inputs)
        if observed([inputs[i] for i in spec.tensors]):
            result = op.dispatched(*inputs, save, kernels)
        elif any_autocast():
            result = _under_autocast(op, inputs, save, kernels)
        elif save:
            result = Differentiable.apply(op, None, None, True, kernels, *inputs)
        else:
            result = op.forward(inputs, False, kernels)
    return result[0] if spec.saved else result


def _under_autocast(op: Op, inputs: Sequence[Any], save: bool, kernels: str) -> Any:
    """Past the dispatcher. The autograd formula casts the parameters itself and gives their gradients in their own
    dtype, without a rounding to autocast's."""
    spec = op.spec
    device = inputs[spec.compute].device.type
    dtype = None
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        inputs = spec.cast(inputs, dtype, [i for i in spec.tensors if not save or i not in spec.parameters])
    with without_autocast():
        if save:
            return Differentiable.apply(op, None, dtype, True, kernels, *inputs)
        return op.forward(inputs, False, kernels)
