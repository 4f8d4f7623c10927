"""An op's plain PyTorch as one more backend of the dispatcher ops."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .spec import OpSpec


def forward(spec: OpSpec, inputs: Sequence[Any], save: bool) -> Any:
    """(out, *saved), or out alone where the op saves nothing."""
    with _mixed_dtypes(spec, inputs):
        out = spec.reference(*inputs).contiguous()
        if not spec.saved:
            return out
        if not save:
            return out, *without_rows(spec.outputs(inputs)[1:])
        if out.numel() == 0:
            return out, *spec.outputs(inputs)[1:]
        assert spec.save is not None
        return out, *spec.save(*inputs)


def without_rows(saved: Sequence[Tensor]) -> list[Tensor]:
    """What is saved where no backward will come."""
    return [t.new_empty((0, *t.shape[1:])) for t in saved]


def backward(spec: OpSpec, args: Sequence[Any]) -> list[Tensor]:
    """The gradients that are needed, for the arguments of the op's backward but `kernels`."""
    grad_out, inputs, _, needs = spec.split(args)
    # An op's implementation runs below autograd, where nothing would be recorded; this takes it back above.
    with torch.inference_mode(False):
        inputs = [t.detach() if isinstance(t, Tensor) else t for t in inputs]
        wanted = [i for i, needed in zip(spec.differentiated, needs) if needed]
        for i in wanted:
            inputs[i].requires_grad_()
        grads = differentiate(spec, inputs, wanted, grad_out, create_graph=False)
    return [g.clone(memory_format=torch.contiguous_format) for g in grads]


def differentiate(
    spec: OpSpec, inputs: Sequence[Any], wanted: Sequence[int], grad_out: Tensor, *, create_graph: bool
) -> Sequence[Tensor]:
    """The gradients of these of the inputs, which require them, by the reference's own."""
    with torch.enable_grad(), _mixed_dtypes(spec, inputs):
        out = spec.reference(*inputs)
    leaves = [inputs[i] for i in wanted]
    return torch.autograd.grad(out, leaves, grad_out, create_graph=create_graph, materialize_grads=True)


def _mixed_dtypes(spec: OpSpec, inputs: Sequence[Any]) -> AbstractContextManager[Any]:
    """The context in which the reference runs: the dispatcher ops meet 16-bit matrices beside other dtypes below
    autocast, where the reference needs it back, and beside parameters in float32, with which it does the same."""
    dtype, device = inputs[spec.compute].dtype, inputs[spec.compute].device.type
    mixed = dtype.itemsize == 2 and any(inputs[i] is not None and inputs[i].dtype is not dtype for i in spec.tensors)
    return torch.autocast(device, dtype if mixed else None, enabled=mixed)
