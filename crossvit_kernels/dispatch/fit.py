"""What the dispatcher ops are given, which anybody can call, must fit together before a kernel or the reference runs.

The public functions have validated their arguments; the kernels of C++ and CUDA look at theirs themselves.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .register import Op


def fit(op: "Op", inputs: Sequence[Any], *, symbolic: bool = False, passed: str | None = None) -> None:
    """Raises ValueError or TypeError unless the inputs of the op have shapes, dtypes and a device that fit.

    `symbolic`: sizes may be symbols, of which nothing is asked. `passed`: what the input is called to which out's
    gradient passes, where that stands in its place.
    """
    compute = inputs[op.compute]
    dtype, device = compute.dtype, compute.device
    for i, shape in zip(op.tensors, op.shapes(*inputs)):
        value = inputs[i]
        if value is None:
            continue
        if value.shape != shape if not symbolic else _differ(value.shape, shape):
            _wrong_shape(_name(op, i, passed), value, shape)
        if value.device != device:
            at = op.inputs[op.compute]
            raise ValueError(f"{_name(op, i, passed)}: expected to be on {device} as {at} is, got {value.device}")
        if value.dtype is not dtype and (i in op.matrices or value.dtype is not torch.float32):
            also = "" if i in op.matrices else " or torch.float32"
            raise TypeError(f"{_name(op, i, passed)}: expected {dtype}{also}, got {value.dtype}")
    if op.promoted:
        first, second = op.promoted
        if inputs[first].dtype is not inputs[second].dtype:
            wanted = f"{inputs[first].dtype} as {op.inputs[first]} is"
            raise TypeError(f"{op.inputs[second]}: expected {wanted}, got {inputs[second].dtype}")


def fit_backward(op: "Op", args: Sequence[Any], *, symbolic: bool = False) -> None:
    """The same of the arguments of the op's backward, as far as `needs`; also of out's gradient and what was saved."""
    inputs, grad_out, needs = op.inputs_of_backward(args), args[0], args[-2]
    fit(op, inputs, symbolic=symbolic, passed="grad_out")
    compute = inputs[op.compute]
    (shape, out_dtype), *saved = op.results(*inputs)
    if grad_out.shape != shape if not symbolic else _differ(grad_out.shape, shape):
        _wrong_shape("grad_out", grad_out, shape)
    if grad_out.device != compute.device:
        raise ValueError(f"grad_out: expected to be on {compute.device}, got {grad_out.device}")
    if grad_out.dtype is not compute.dtype and grad_out.dtype is not torch.float32:
        raise TypeError(f"grad_out: expected {compute.dtype} or torch.float32, got {grad_out.dtype}")
    names = op.saved
    if op.takes_out:
        names, saved = ("out", *names), [(shape, out_dtype), *saved]
    for name, value, (shape, dtype) in zip(names, args[1 + len(op.kept) :], saved):
        if value.shape != shape if not symbolic else _differ(value.shape, shape):
            _wrong_shape(name, value, shape)
        if value.dtype is not dtype or value.device != compute.device:
            raise TypeError(
                f"{name}: expected {dtype} on {compute.device}, as the forward saves it, got {value.dtype} on "
                f"{value.device}"
            )
    tensors = [i for i in op.kept if i in op.tensors]
    if len(needs) != len(tensors):
        raise ValueError(f"needs: expected one for each of {len(tensors)} tensors, got {len(needs)}")
    for i, needed in zip(tensors, needs):
        if needed and inputs[i] is None:
            raise ValueError(f"needs: expected False for {op.inputs[i]}, which is None, got True")


class Fitting:
    """The argument lists that one op's backward, which sees the same ones over and over, was found to fit."""

    MOST = 4096

    def __init__(self, op: "Op") -> None:
        self.op = op
        self.known: set[tuple[Any, ...]] = set()

    def __call__(self, args: Sequence[Any]) -> None:
        """`fit_backward`, where these shapes, dtypes, devices and numbers have not been met."""
        *given, needs, _ = args
        key = (*[(a.shape, a.dtype, a.device) if isinstance(a, Tensor) else a for a in given], *needs)
        if key in self.known:
            return
        fit_backward(self.op, args)
        if len(self.known) >= self.MOST:
            self.known.clear()
        self.known.add(key)


def _name(op: "Op", i: int, passed: str | None) -> str:
    return op.inputs[i] if passed is None or i != op.passed else passed


def _differ(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    """Whether two shapes differ as far as is known, without asking a symbol."""
    return len(found) != len(expected) or any(
        type(a) is int and type(b) is int and a != b for a, b in zip(found, expected)
    )


def _wrong_shape(name: str, value: Tensor, shape: Sequence[int]) -> None:
    raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
