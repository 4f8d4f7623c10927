"""What several ops launch for a LayerNorm: rows normalised to memory, and its backward."""

from collections.abc import Sequence

from torch import Tensor

from .. import defaults
from ..configs import configuration
from ..kernels.layer_norm import layer_norm_backward, layer_norm_rows
from ..launch import launch
from ..target import multiprocessors
from ..tiling import cdiv
from ..views import Rows, optional_arguments, pointers
from .linear import sum_partials


def norm_rows(
    x: Rows,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    gelu: bool,
    y: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> None:
    """Fills `y` (rows, D), and mean and rstd (rows,), float32, where they are given."""
    width = x.tensor.shape[-1]
    config = configuration("layer_norm_rows", width, y.dtype, defaults.layer_norm_rows(width))
    launch(
        layer_norm_rows,
        (cdiv(x.count, config["BLOCK_M"]),),
        config,
        **x.arguments("x"),
        **pointers(norm_weight=norm_weight, norm_bias=norm_bias),
        y_ptr=y,
        mean_ptr=mean,
        rstd_ptr=rstd,
        rows=x.count,
        eps=eps,
        WIDTH=width,
        GELU=gelu,
    )


def norm_gradients(
    grad: Tensor,
    x: Rows,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    needs: Sequence[bool],
    *,
    shape: Sequence[int],
    gelu_in: bool = False,
    add: Rows | None = None,
    y: Tensor | None = None,
) -> list[Tensor]:
    """Those of the gradients of x, in this shape, norm_weight and norm_bias that `needs` names, from `grad`, that of
    act(LayerNorm(x)), dense. `add` is added to x's; `y` becomes act(LayerNorm(x))."""
    width = norm_weight.shape[0]
    config = configuration("layer_norm_backward", width, norm_weight.dtype, defaults.layer_norm_backward(width))
    programs = min(cdiv(x.count, config["BLOCK_M"]), 3 * multiprocessors())
    grad_x = x.tensor.new_empty(shape) if needs[0] else None
    sums = [norm_weight.new_empty(width) if needed else None for needed in needs[1:3]]
    partial = mean.new_empty((programs, 2 * width)) if needs[1] or needs[2] else None
    launch(
        layer_norm_backward,
        (programs,),
        config,
        grad_ptr=grad,
        **x.arguments("x"),
        **optional_arguments(add, "add"),
        mean_ptr=mean,
        rstd_ptr=rstd,
        **pointers(norm_weight=norm_weight, norm_bias=norm_bias),
        grad_x_ptr=grad_x,
        y_ptr=y,
        partial_ptr=partial,
        rows=x.count,
        WIDTH=width,
        GELU=gelu_in,
    )
    if partial is not None:
        sum_partials(partial, width, *sums)
    return [g for g in (grad_x, *sums) if g is not None]
