"""linear_residual: a tiled matrix product whose last step adds bias, scale and residual."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import defaults
from ..configs import Config, configuration
from ..kernels.linear_residual import linear_residual_forward, linear_scale_gradient
from ..launch import launch
from ..target import dot_precision, multiprocessors
from ..tiling import cdiv
from ..views import SAMPLE, Rows, Scale, pointers, rows_of, scale_of
from . import linear
from .linear import input_gradient, parameter_gradients


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    scale: Tensor | None,
    per_sample: bool,
    save: bool,
) -> Tensor:
    """residual + scale * Linear(x)."""
    out = weight.new_empty(residual.shape, dtype=torch.promote_types(residual.dtype, weight.dtype))
    launch_forward(rows_of(x), weight, bias, rows_of(residual), scale_of(scale, per_sample, residual), out)
    return out


def launch_forward(x: Rows, weight: Tensor, bias: Tensor | None, residual: Rows, scale: Scale, out: Tensor) -> None:
    """Fills `out`."""
    weight = weight.contiguous()
    features, width = weight.shape
    bias = None if bias is None else bias.contiguous()
    if linear.fits(x, weight, out):
        linear.linear(x, weight, bias, out, residual=residual, scale=scale)
        return
    precision = dot_precision(weight.dtype)
    config = _configuration(x.count, weight, precision)
    launch(
        linear_residual_forward,
        (cdiv(x.count, config["BLOCK_M"]) * cdiv(features, config["BLOCK_N"]),),
        config,
        **x.arguments("x"),
        weight_ptr=weight,
        bias_ptr=bias,
        **residual.arguments("residual"),
        **scale.arguments(),
        out_ptr=out,
        rows=x.count,
        width=width,
        features=features,
        PRECISION=precision,
    )


def backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    per_sample: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients that are needed, of x, weight, bias and scale."""
    grad, rows, factor = rows_of(grad_out), rows_of(x), scale_of(scale, per_sample, grad_out)
    result = []
    if needs[0]:
        result.append(input_gradient(grad, factor, weight, weight.new_empty(x.shape)))
    result += parameter_gradients(grad, factor, rows, weight, needs[1], needs[2])
    if needs[3]:
        assert scale is not None
        result.append(scale_gradient(grad, rows, weight, bias, scale, factor))
    return result


def scale_gradient(
    grad: Rows, x: Rows, weight: Tensor, bias: Tensor | None, scale: Tensor, factor: Scale, gelu_in: bool = False
) -> Tensor:
    """The gradient of `scale` in residual + scale * Linear(x), or of gelu(x): the Linear is made again."""
    weight = weight.contiguous()
    features, width = weight.shape
    precision = dot_precision(weight.dtype)
    config = _configuration(x.count, weight, precision)
    row_tiles, column_tiles = cdiv(x.count, config["BLOCK_M"]), cdiv(features, config["BLOCK_N"])
    per_sample = factor.kind == SAMPLE
    shape = (x.count, column_tiles) if per_sample else (row_tiles, features)
    partial = weight.new_empty(shape, dtype=torch.float32)
    launch(
        linear_scale_gradient,
        (row_tiles * column_tiles,),
        config,
        **grad.arguments("grad"),
        **x.arguments("x"),
        **pointers(weight=weight, bias=bias),
        partial_ptr=partial,
        rows=x.count,
        width=width,
        features=features,
        GELU=gelu_in,
        PER_SAMPLE=per_sample,
        PRECISION=precision,
    )
    total = partial.view(scale.numel(), -1).sum(1) if per_sample else partial.sum(0)
    return total.to(scale.dtype).view(scale.shape)


def _configuration(rows: int, weight: Tensor, precision: str) -> Config:
    """How a tile of the product is made, in the forward and again for the gradient of the scale."""
    (features, width), dtype = weight.shape, weight.dtype
    name, default = defaults.linear_residual(rows, features, width, dtype, precision, multiprocessors())
    return configuration(name, width, dtype, default)
