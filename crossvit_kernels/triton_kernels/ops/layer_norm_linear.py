"""layer_norm_linear: a program normalises a tile of rows once and multiplies it by all of the weight's column tiles."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import defaults
from ..configs import configuration
from ..kernels.layer_norm_linear import gelu_backward, layer_norm_linear_forward
from ..launch import launch
from ..target import dot_precision, multiprocessors
from ..tiling import WIDEST_HELD, cdiv, column_splits
from ..views import UNSCALED, Rows, pointers, rows_of
from . import linear
from .layer_norm import norm_gradients, norm_rows
from .linear import input_gradient, parameter_gradients


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    gelu_in: bool,
    gelu_out: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    """(out, mean, rstd, pre) of the op, the last three without rows unless `save`."""
    rows, features = x.numel() // x.shape[-1], weight.shape[0]
    out = weight.new_empty((*x.shape[:-1], features))
    mean = weight.new_empty(rows if save else 0, dtype=torch.float32)
    rstd = weight.new_empty(rows if save else 0, dtype=torch.float32)
    pre = weight.new_empty((rows if save and gelu_out else 0, features))
    launch_forward(rows_of(x), norm_weight, norm_bias, weight, bias, eps, gelu_in, gelu_out, out, mean, rstd, pre)
    return out, mean, rstd, pre


def launch_forward(
    x: Rows,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    gelu_in: bool,
    gelu_out: bool,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    pre: Tensor,
) -> None:
    """Fills `out` and, where they have rows, the saved tensors."""
    weight = weight.contiguous()
    features, width = weight.shape
    bias = None if bias is None else bias.contiguous()
    kept = (mean, rstd) if mean.shape[0] else (None, None)
    if linear.takes(x.count, weight, out):
        # Where the copy engine feeds the product, normalising into memory beats doing so in front of it.
        y = rows_of(weight.new_empty((x.count, width)))
        norm_rows(x, norm_weight, norm_bias, eps, gelu_in, y.tensor, *kept)
        linear.linear(y, weight, bias, out, gelu=gelu_out, pre=pre if pre.shape[0] else None)
        return
    dtype, precision = weight.dtype, dot_precision(weight.dtype)
    name, default = defaults.layer_norm_linear(x.count, width, dtype, precision)
    config = configuration(name, width, dtype, default)
    row_tiles, column_tiles = cdiv(x.count, config["BLOCK_M"]), cdiv(features, config["BLOCK_N"])
    share = cdiv(column_tiles, column_splits(row_tiles, column_tiles, multiprocessors()))
    launch(
        layer_norm_linear_forward,
        (row_tiles, cdiv(column_tiles, share)),
        config,
        **x.arguments("x"),
        **pointers(norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=bias),
        out_ptr=out,
        mean_ptr=kept[0],
        rstd_ptr=kept[1],
        pre_ptr=pre if pre.shape[0] else None,
        rows=x.count,
        features=features,
        features_per_program=share * config["BLOCK_N"],
        eps=eps,
        WIDTH=width,
        GELU_IN=gelu_in,
        GELU_OUT=gelu_out,
        PRECISION=precision,
        HELD=dtype.itemsize == 2 and width <= WIDEST_HELD,
    )


def backward(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    gelu_in: bool,
    gelu_out: bool,
    mean: Tensor,
    rstd: Tensor,
    pre: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients that are needed, of x, norm_weight, norm_bias, weight and bias."""
    grad = rows_of(grad_out)
    if gelu_out:
        out = torch.empty_like(pre)
        config = configuration("gelu_backward", 0, pre.dtype, defaults.GELU_BACKWARD)
        launch(
            gelu_backward,
            (cdiv(pre.numel(), config["BLOCK"]),),
            config,
            **grad.arguments("grad"),
            pre_ptr=pre,
            out_ptr=out,
            size=pre.numel(),
            width=pre.shape[1],
        )
        grad = rows_of(out)
    return backward_of_linear(grad, x, norm_weight, norm_bias, weight, gelu_in, mean, rstd, needs)


def backward_of_linear(
    grad: Rows,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    gelu_in: bool,
    mean: Tensor,
    rstd: Tensor,
    needs: Sequence[bool],
    add: Rows | None = None,
) -> list[Tensor]:
    """The gradients that are needed, of x, norm_weight, norm_bias, weight and bias, from that of the Linear's output;
    `add` is added to x's."""
    rows = rows_of(x)
    result, inputs = [], rows
    norm = (mean, rstd, norm_weight, norm_bias)
    if needs[0] or needs[1] or needs[2]:
        shape = rows.count, x.shape[-1]
        grad_y = input_gradient(grad, UNSCALED, weight, weight.new_empty(shape))
        # What the weight's gradient multiplies is written here once, rather than made again by each of its programs.
        y = weight.new_empty(shape) if needs[3] else None
        result = norm_gradients(
            grad_y, rows, mean, rstd, norm_weight, norm_bias, needs, shape=x.shape, gelu_in=gelu_in, add=add, y=y
        )
        if y is not None:
            inputs, norm, gelu_in = rows_of(y), None, False
    return result + parameter_gradients(grad, UNSCALED, inputs, weight, needs[3], needs[4], norm=norm, gelu_in=gelu_in)
