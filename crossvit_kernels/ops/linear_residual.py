"""linear_residual: residual + scale · Linear(x), a pre-norm block's way back onto its residual stream.

out = residual + scale ∘ (weight x + bias)          x (..., K), weight (E, K), residual and out (..., E)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch.call import call, needs_reference
from ..dispatch.register import register
from ..dispatch.spec import Argument, LinearParams, OpSpec, Result, Shapes
from . import validate


def linear_residual_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *, scale: Tensor | None = None
) -> Tensor:
    """linear_residual in plain PyTorch."""
    y = F.linear(x, weight, bias)
    return residual + (y if scale is None else scale * y)


_LINEAR = LinearParams("weight", "bias")


def _shapes(x: Tensor, weight: Tensor, scale: Tensor | None, per_sample: bool) -> Shapes:
    validate.tensor("x", x, "(..., K)")
    validate.tensor("weight", weight, "(E, K)")
    features = weight.shape[0]
    validate.positive("weight's rows", features)
    return {
        "x": x.shape,
        **_LINEAR.shapes(features, x.shape[-1]),
        "residual": (*x.shape[:-1], features),
        "scale": validate.scale_shape(scale, per_sample, x, features),
    }


def _results(weight: Tensor, residual: Tensor) -> tuple[Result, ...]:
    return ((residual.shape, torch.promote_types(residual.dtype, weight.dtype)),)


def _flops(backend: str, x: Tensor, weight: Tensor) -> int:
    return 2 * math.prod(x.shape[:-1]) * weight.shape[0] * weight.shape[1]


def _backward_flops(backend: str, needs: dict[str, bool], x: Tensor, weight: Tensor) -> int:
    # The gradient of scale needs the Linear's output again.
    return (needs["x"] + needs["weight"] + needs["scale"]) * _flops(backend, x, weight)


_op = register(
    OpSpec(
        "linear_residual",
        [
            Argument("x", activation=True, matrix=True),
            _LINEAR,
            Argument("residual", activation=True, passed=True),
            Argument("scale", "Tensor?"),
            Argument("per_sample", "bool"),  # what `scale` is, decided once, below
        ],
        computes_in="weight",
        reference=linear_residual_reference,
        shapes=_shapes,
        results=_results,
        flops=_flops,
        backward_flops=_backward_flops,
        save=lambda: (),
    )
)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    scale: Tensor | None = None,
    kernels: str = "auto",
) -> Tensor:
    """residual + scale · Linear(x).

    Args:
        x: (..., K), floating point, any strides.
        weight, bias: (E, K) and (E,), as nn.Linear holds them; the bias may be None.
        residual: (..., E), any floating dtype and strides.
        scale: None, or a factor per sample, (B, 1, ..., 1) with as many dimensions as x (drop path), or per channel,
            (E,) (LayerScale).
        kernels: the backend, see `crossvit_kernels.backends`.

    Returns:
        (..., E) in the dtype to which residual, scale and Linear(x) promote.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value is wrong; RuntimeError: the backend
            asked for is not there.
    """
    validate.tensor("x", x, "(..., K)")
    validate.positive("x's width", x.shape[-1])
    width = validate.matrix("weight", weight, "bias", bias, x.shape[-1], "x", x)
    validate.beside("residual", residual, (*x.shape[:-1], width), "x", x, any_dtype=True)
    per_sample = scale is not None and validate.scale(scale, x, width)
    if needs_reference(_op, (x, weight, bias, residual, scale, per_sample), kernels):
        return linear_residual_reference(x, weight, bias, residual, scale=scale)
    residual, scale = validate.promoted(residual, scale, weight)
    return call(_op, (x, weight, bias, residual, scale, per_sample), kernels)
