"""What several ops launch for a LayerNorm: rows normalised to memory, and its backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import defaults
from ..configs import configuration
from ..kernels.layer_norm import layer_norm_backward, layer_norm_rows
from ..launch import launch
from ..target import multiprocessors
from ..tiling import cdiv
from ..views import Norm, Rows
from .linear import sum_partials


def norm_rows(x: Rows, norm: Norm, eps: float, gelu: bool, y: Tensor) -> None:
    """Fills `y` (rows, D), and the norm's statistics where they are given."""
    width = y.shape[-1]
    config = configuration("layer_norm_rows", width, y.dtype, defaults.layer_norm_rows(width))
    options = {"eps": eps, "WIDTH": width, "GELU": gelu}
    launch(layer_norm_rows, (cdiv(x.count, config["BLOCK_M"]),), config, x=x, norm=norm, y_ptr=y, **options)


def norm_gradients(
    grad: Tensor,
    x: Rows,
    norm: Norm,
    needs: Sequence[bool],
    grad_x: Tensor | None,
    *,
    gelu_in: bool = False,
    add: Rows | None = None,
    y: Tensor | None = None,
) -> list[Tensor]:
    """Those of the gradients of x, norm_weight and norm_bias that `needs` names, from `grad`, that of
    act(LayerNorm(x)), dense; x's in `grad_x`. `add` is added to it; `y` becomes act(LayerNorm(x))."""
    weight, width = norm.weight, norm.weight.shape[0]
    config = configuration("layer_norm_backward", width, weight.dtype, defaults.layer_norm_backward(width))
    programs = min(cdiv(x.count, config["BLOCK_M"]), 3 * multiprocessors())
    sums = [weight.new_empty(width) if needed else None for needed in needs[1:3]]
    partial = grad.new_empty((programs, 2 * width), dtype=torch.float32) if needs[1] or needs[2] else None
    tensors = {"grad_ptr": grad, "grad_x_ptr": grad_x, "y_ptr": y, "partial_ptr": partial}
    launch(layer_norm_backward, (programs,), config, tensors, x=x, add=add, norm=norm, WIDTH=width, GELU=gelu_in)
    if partial is not None:
        sum_partials(partial, width, *sums)
    return [g for g in (grad_x, *sums) if g is not None]
