"""layer_norm_linear: a program normalises a tile of rows once and multiplies it by all of the weight's column tiles."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import defaults
from ..configs import configuration
from ..kernels.layer_norm_linear import gelu_backward, layer_norm_linear_forward
from ..launch import launch
from ..target import dot_precision, multiprocessors
from ..tiling import WIDEST_HELD, cdiv, column_splits
from ..views import UNSCALED, Linear, Norm, Rows, contiguous, rows_of
from . import linear
from .layer_norm import norm_gradients, norm_rows
from .linear import input_gradient, parameter_gradients


def forward(call: Any) -> tuple[Tensor, ...]:
    """(out, mean, rstd, pre) of the op, the last three without rows unless `save`."""
    activations = {"gelu_in": call.gelu_in, "gelu_out": call.gelu_out}
    return launch_forward(call.x, call, Linear(call.weight, call.bias), **activations)


def launch_forward(x: Tensor, call: Any, params: Linear, gelu_in: bool, gelu_out: bool) -> tuple[Tensor, ...]:
    """The op with this Linear, and the LayerNorm, eps and `save` of a call."""
    rows, weight, save = rows_of(x), params.weight.contiguous(), call.save
    features, width = weight.shape
    out = weight.new_empty((*x.shape[:-1], features))
    mean, rstd = (weight.new_empty(rows.count if save else 0, dtype=torch.float32) for _ in range(2))
    pre = weight.new_empty((rows.count if save and gelu_out else 0, features))
    params = Linear(weight, contiguous(params.bias))
    norm = Norm(contiguous(call.norm_weight), contiguous(call.norm_bias), *((mean, rstd) if save else ()))
    kept_pre = pre if pre.shape[0] else None
    if linear.takes(rows.count, weight, out):
        # Where the copy engine feeds the product, normalising into memory beats doing so in front of it.
        y = weight.new_empty((rows.count, width))
        norm_rows(rows, norm, call.eps, gelu_in, y)
        linear.linear(rows_of(y), params, out, gelu=gelu_out, pre=kept_pre)
        return out, mean, rstd, pre
    dtype, precision = weight.dtype, dot_precision(weight.dtype)
    name, default = defaults.layer_norm_linear(rows.count, width, dtype, precision)
    config = configuration(name, width, dtype, default)
    row_tiles, column_tiles = cdiv(rows.count, config["BLOCK_M"]), cdiv(features, config["BLOCK_N"])
    share = cdiv(column_tiles, column_splits(row_tiles, column_tiles, multiprocessors()))
    launch(
        layer_norm_linear_forward,
        (row_tiles, cdiv(column_tiles, share)),
        config,
        x=rows,
        norm=norm,
        linear=params,
        out_ptr=out,
        pre_ptr=kept_pre,
        features=features,
        features_per_program=share * config["BLOCK_N"],
        eps=call.eps,
        WIDTH=width,
        GELU_IN=gelu_in,
        GELU_OUT=gelu_out,
        PRECISION=precision,
        HELD=dtype.itemsize == 2 and width <= WIDEST_HELD,
    )
    return out, mean, rstd, pre


def backward(call: Any) -> list[Tensor]:
    """The gradients that are needed, of x, norm_weight, norm_bias, weight and bias."""
    grad, pre = rows_of(call.grad_out), call.pre
    if call.gelu_out:
        out = torch.empty_like(pre)
        config = configuration("gelu_backward", 0, pre.dtype, defaults.GELU_BACKWARD)
        sizes = {"size": pre.numel(), "width": pre.shape[1]}
        launch(gelu_backward, (cdiv(pre.numel(), config["BLOCK"]),), config, sizes, grad=grad, pre_ptr=pre, out_ptr=out)
        grad = rows_of(out)
    return backward_of_linear(grad, call, call.weight, call.gelu_in, call.needs)


def backward_of_linear(
    grad: Rows, call: Any, weight: Tensor, gelu_in: bool, needs: Sequence[bool], add: Rows | None = None
) -> list[Tensor]:
    """The gradients that are needed, of x, norm_weight, norm_bias, weight and bias, from that of the Linear's output;
    x, the LayerNorm and its statistics are a call's. `add` is added to x's."""
    x, rows = call.x, rows_of(call.x)
    norm = Norm(contiguous(call.norm_weight), contiguous(call.norm_bias), call.mean, call.rstd)
    result = []
    if needs[0] or needs[1] or needs[2]:
        shape = rows.count, x.shape[-1]
        grad_y = input_gradient(grad, UNSCALED, weight, weight.new_empty(shape))
        # What the weight's gradient multiplies is written here once, rather than made again by each of its programs.
        y = weight.new_empty(shape) if needs[3] else None
        grad_x = x.new_empty(x.shape) if needs[0] else None
        result = norm_gradients(grad_y, rows, norm, needs, grad_x, gelu_in=gelu_in, add=add, y=y)
        if y is not None:
            return result + parameter_gradients(grad, UNSCALED, rows_of(y), weight, needs[3:5])
    return result + parameter_gradients(grad, UNSCALED, rows, weight, needs[3:5], norm=norm, gelu_in=gelu_in)
