"""linear_residual: a tiled matrix product whose last step adds bias, scale and residual."""

from typing import Any

import torch
from torch import Tensor

from .. import defaults
from ..configs import Config, configuration
from ..kernels.linear_residual import linear_residual_forward, linear_scale_gradient
from ..launch import launch
from ..target import dot_precision, multiprocessors
from ..tiling import cdiv
from ..views import Arguments, Linear, Rows, Scale, contiguous, rows_of, scale_of
from . import linear
from .linear import input_gradient, parameter_gradients


def forward(call: Any) -> Tensor:
    """residual + scale * Linear(x)."""
    weight, residual = call.weight, call.residual
    out = weight.new_empty(residual.shape, dtype=torch.promote_types(residual.dtype, weight.dtype))
    scale = scale_of(call.scale, call.per_sample, residual)
    launch_forward(rows_of(call.x), Linear(weight, call.bias), rows_of(residual), scale, out)
    return out


def launch_forward(x: Rows, params: Linear, residual: Rows, scale: Scale, out: Tensor) -> None:
    """Fills `out`."""
    params = Linear(params.weight.contiguous(), contiguous(params.bias))
    if linear.fits(x, params.weight, out):
        linear.linear(x, params, out, residual=residual, scale=scale)
        return
    config, given = _product(x, params)
    grid = (cdiv(x.count, config["BLOCK_M"]) * cdiv(params.weight.shape[0], config["BLOCK_N"]),)
    launch(linear_residual_forward, grid, config, given, residual=residual, scale=scale, out_ptr=out)


def backward(call: Any) -> list[Tensor]:
    """The gradients that are needed, of x, weight, bias and scale."""
    grad, rows, needs, weight = rows_of(call.grad_out), rows_of(call.x), call.needs, call.weight
    factor, result = scale_of(call.scale, call.per_sample, call.grad_out), []
    if needs[0]:
        result.append(input_gradient(grad, factor, weight, weight.new_empty(call.x.shape)))
    result += parameter_gradients(grad, factor, rows, weight, needs[1:3])
    if needs[3]:
        result.append(scale_gradient(grad, rows, Linear(weight, call.bias), call.scale, factor))
    return result


def scale_gradient(grad: Rows, x: Rows, params: Linear, scale: Tensor, factor: Scale, gelu_in: bool = False) -> Tensor:
    """The gradient of `scale` in residual + scale * Linear(x), or of gelu(x): the Linear is made again."""
    params = Linear(params.weight.contiguous(), contiguous(params.bias))
    config, given = _product(x, params)
    features, per_sample = params.weight.shape[0], factor.sample is not None
    row_tiles, column_tiles = cdiv(x.count, config["BLOCK_M"]), cdiv(features, config["BLOCK_N"])
    shape = (x.count, column_tiles) if per_sample else (row_tiles, features)
    partial = params.weight.new_empty(shape, dtype=torch.float32)
    given |= {"grad": grad, "partial_ptr": partial, "GELU": gelu_in, "PER_SAMPLE": per_sample}
    launch(linear_scale_gradient, (row_tiles * column_tiles,), config, given)
    total = partial.view(scale.numel(), -1).sum(1) if per_sample else partial.sum(0)
    return total.to(scale.dtype).view(scale.shape)


def _product(x: Rows, params: Linear) -> tuple[Config, Arguments]:
    """How a tile of the product is made, in the forward and again for the gradient of the scale; its arguments."""
    (features, width), dtype, precision = params.weight.shape, params.weight.dtype, dot_precision(params.weight.dtype)
    name, default = defaults.linear_residual(x.count, features, width, dtype, precision, multiprocessors())
    given = {"x": x, "linear": params, "width": width, "features": features, "PRECISION": precision}
    return configuration(name, width, dtype, default), given
