"""layer_norm_mlp: layer_norm_linear with gelu, then linear_residual onto the op's own input."""

import torch
from torch import Tensor

from . import layer_norm_linear, linear_residual
from ._rows import rows_of
from ._scale import scale_of


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    eps: float,
    scale: Tensor | None,
    save: bool,
) -> tuple[Tensor, ...]:
    """(out, mean, rstd, pre) of the op, the last three without rows unless `save`."""
    hidden, mean, rstd, pre = layer_norm_linear.forward(x, norm_weight, norm_bias, w1, b1, eps, False, True, save)
    out = w1.new_empty(x.shape, dtype=torch.promote_types(x.dtype, w1.dtype))
    linear_residual.launch_forward(rows_of(hidden), w2, b2, rows_of(x), scale_of(scale, x), out)
    return out, mean, rstd, pre
