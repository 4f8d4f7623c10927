"""The arguments of the dispatcher ops, which anybody can call, must fit together before a kernel or the reference runs.

The public functions have validated their arguments; the kernels of C++ and CUDA look at theirs themselves.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .spec import OpSpec


def fit(spec: OpSpec, inputs: Sequence[Any], *, symbolic: bool = False, passed: str | None = None) -> None:
    """Raises ValueError or TypeError unless the inputs of the op have shapes, dtypes and a device that fit.

    symbolic: whether sizes may be symbols; a symbol is never asked.
    passed: the name of what stands in the place of the input to which out's gradient passes, where something does.
    """
    compute = inputs[spec.compute]
    dtype, device = compute.dtype, compute.device
    shapes = spec.shapes(*inputs)
    for i in spec.tensors:
        value, name = inputs[i], spec.inputs[i] if passed is None or i != spec.passed else passed
        if value is None:
            continue
        _look_at_shape(name, value, shapes[spec.inputs[i]], symbolic)
        if value.device != device:
            raise ValueError(f"{name}: expected to be on {device} as {spec.computes_in} is, got {value.device}")
        matrix = spec.arguments[i].matrix
        if value.dtype is not dtype and (matrix or value.dtype is not torch.float32):
            also = "" if matrix else " or torch.float32"
            raise TypeError(f"{name}: expected {dtype}{also}, got {value.dtype}")
    if spec.promoted:
        first, second = spec.promoted
        if inputs[first].dtype is not inputs[second].dtype:
            wanted = f"{inputs[first].dtype} as {spec.inputs[first]} is"
            raise TypeError(f"{spec.inputs[second]}: expected {wanted}, got {inputs[second].dtype}")


def fit_backward(spec: OpSpec, args: Sequence[Any], *, symbolic: bool = False) -> None:
    """The same for the arguments of the op's backward but `kernels`; out's gradient and what was saved must fit too."""
    grad_out, inputs, found, needs = spec.split(args)
    fit(spec, inputs, symbolic=symbolic, passed="grad_out")
    compute = inputs[spec.compute]
    (shape, out_dtype), *saved = spec.results(*inputs)
    _look_at_shape("grad_out", grad_out, shape, symbolic)
    if grad_out.device != compute.device:
        raise ValueError(f"grad_out: expected to be on {compute.device}, got {grad_out.device}")
    if grad_out.dtype is not compute.dtype and grad_out.dtype is not torch.float32:
        raise TypeError(f"grad_out: expected {compute.dtype} or torch.float32, got {grad_out.dtype}")
    if spec.takes_out:
        saved = [(shape, out_dtype), *saved]
    for name, value, (shape, dtype) in zip(spec.backward_saved, found, saved):
        _look_at_shape(name, value, shape, symbolic)
        if value.dtype is not dtype or value.device != compute.device:
            raise TypeError(
                f"{name}: expected {dtype} on {compute.device}, as the forward saves it, got {value.dtype} on "
                f"{value.device}"
            )
    if len(needs) != len(spec.differentiated):
        raise ValueError(f"needs: expected one for each of {len(spec.differentiated)} tensors, got {len(needs)}")
    for i, needed in zip(spec.differentiated, needs):
        if needed and inputs[i] is None:
            raise ValueError(f"needs: expected False for {spec.inputs[i]}, which is None, got True")


class Fitting:
    """The argument lists that one op's backward, which sees the same ones over and over, was found to fit."""

    MOST = 4096

    def __init__(self, spec: OpSpec) -> None:
        self.spec = spec
        self.known: set[tuple[Any, ...]] = set()

    def __call__(self, args: Sequence[Any]) -> None:
        """`fit_backward`, where these shapes, dtypes, devices and numbers have not been met."""
        *given, needs = args
        key = (*[(a.shape, a.dtype, a.device) if isinstance(a, Tensor) else a for a in given], *needs)
        if key in self.known:
            return
        fit_backward(self.spec, args)
        if len(self.known) >= self.MOST:
            self.known.clear()
        self.known.add(key)


def _look_at_shape(name: str, value: Tensor, shape: Sequence[int], symbolic: bool) -> None:
    """Raises ValueError where two shapes differ; with symbols as far as is known without asking one."""
    found = value.shape
    known = [(a, b) for a, b in zip(found, shape) if type(a) is int and type(b) is int] if symbolic else []
    if found != shape if not symbolic else len(found) != len(shape) or any(a != b for a, b in known):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(found)}")
