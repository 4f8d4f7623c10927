"""Registers an op with PyTorch's dispatcher, once for all backends, so that autograd, autocast, torch.compile,
torch.export, ONNX and the FLOP counter see one node."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .autograd import Differentiable, second_derivative
from .fit import fit, fit_backward
from .op import Op
from .spec import NAMESPACE, OpSpec
from .torch_internals import (
    any_requires_grad,
    below_autograd,
    let_inductor_call,
    plain_call,
    register_decomposition,
    without_autocast,
)

LIBRARY = torch.library.Library(NAMESPACE, "DEF")

OPS: dict[str, OpSpec] = {}
"""{name: what the op is}, of all ops that are registered"""


def register(spec: OpSpec) -> Op:
    """Defines the op's dispatcher ops and registers everything that PyTorch asks of them."""
    OPS[spec.name] = spec
    LIBRARY.define(spec.schema)
    if spec.save is not None:
        LIBRARY.define(spec.backward_schema)
    op = Op(spec)
    _register_forward(op)
    if spec.save is not None:
        _register_backward(op)
    return op


def _register_forward(op: Op) -> None:
    spec = op.spec
    fake = _fake(op)
    LIBRARY.impl(spec.name, op.forward_checked, "CompositeExplicitAutograd")
    LIBRARY.impl(spec.name, _autograd(op), "Autograd", with_keyset=True)
    for device in ("CPU", "CUDA") if spec.matrices else ():
        LIBRARY.impl(spec.name, _autocast(op, device.lower()), f"Autocast{device}")
    torch.library.register_fake(f"{NAMESPACE}::{spec.name}", fake, lib=LIBRARY)
    register_decomposition(op.dispatched, lambda *args: decompose(spec, *args), fake)

    def count(*args: Any, out_val: Any = None, **_: Any) -> int:
        *inputs, _save, kernels = args
        return spec.flops(op.backend(inputs, kernels), *inputs)

    register_flop_formula(op.dispatched.overloadpacket, get_raw=True)(count)


def _register_backward(op: Op) -> None:
    spec, name = op.spec, f"{op.spec.name}_backward"
    LIBRARY.impl(name, op.backward, "CompositeExplicitAutograd")
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, _without_autocast(op), f"Autocast{device}")
    torch.library.register_fake(f"{NAMESPACE}::{name}", _fake_backward(spec), lib=LIBRARY)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", second_derivative(spec), lib=LIBRARY)

    def count(*args: Any, out_val: Any = None, **ignored: Any) -> int:
        assert spec.backward_flops is not None
        *given, kernels = args
        _grad_out, inputs, _saved, needed = spec.split(given)
        backend = op.backend(inputs, kernels, "_backward")
        again = spec.flops(backend, *inputs) if backend == "reference" else 0
        names = [spec.inputs[i] for i in spec.differentiated]
        return again + spec.backward_flops(backend, dict(zip(names, needed)), *inputs)

    register_flop_formula(op.backward_dispatched.overloadpacket, get_raw=True)(count)


def decompose(spec: OpSpec, *args: Any) -> Any:
    """The dispatcher op in plain PyTorch."""
    *inputs, save, _ = args
    return reference.forward(spec, inputs, save)


def _fake(op: Op) -> Callable:
    def fake(*args: Any) -> Any:
        *inputs, save, _ = args
        let_inductor_call(op.dispatched)
        fit(op.spec, inputs, symbolic=True)
        out, *saved = op.spec.outputs(inputs)
        return (out, *(saved if save else reference.without_rows(saved))) if saved else out

    return fake


def _fake_backward(spec: OpSpec) -> Callable:
    def fake(*args: Any) -> list[Tensor]:
        *given, _ = args
        fit_backward(spec, given, symbolic=True)
        _, inputs, _, needs = spec.split(given)
        return [inputs[i].new_empty(inputs[i].shape) for i, needed in zip(spec.differentiated, needs) if needed]

    return fake


def _autograd(op: Op) -> Callable:
    def differentiate(keyset: Any, *args: Any) -> Any:
        *inputs, save, kernels = args
        if not plain_call(inputs):
            return reference.forward(op.spec, inputs, save)
        if torch.is_grad_enabled() and any_requires_grad(*inputs):
            return Differentiable.apply(op, keyset, None, save, kernels, *inputs)
        return below_autograd(op.dispatched, keyset, *args)

    return differentiate


def _autocast(op: Op, device: str) -> Callable:
    def run(*args: Any) -> Any:
        cast = op.spec.cast(args, torch.get_autocast_dtype(device), op.spec.tensors)
        with without_autocast():
            return op.dispatched(*cast)

    return run


def _without_autocast(op: Op) -> Callable:
    """A backward that runs inside an autocast region computes as the one outside."""

    def run(*args: Any) -> list[Tensor]:
        with without_autocast():
            return op.backward_dispatched(*args)

    return run
