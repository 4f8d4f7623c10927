"""layer_norm_mlp: layer_norm_linear with gelu, then linear_residual onto the op's own input."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..views import rows_of, scale_of
from . import layer_norm_linear, linear_residual
from .linear import input_gradient, parameter_gradients


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
    per_sample: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    """(out, mean, rstd, pre) of the op, the last three without rows unless `save`."""
    hidden, mean, rstd, pre = layer_norm_linear.forward(x, norm_weight, norm_bias, w1, b1, eps, False, True, save)
    out = w1.new_empty(x.shape, dtype=torch.promote_types(x.dtype, w1.dtype))
    linear_residual.launch_forward(rows_of(hidden), w2, b2, rows_of(x), scale_of(scale, per_sample, x), out)
    return out, mean, rstd, pre


def backward(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    eps: float,
    scale: Tensor | None,
    per_sample: bool,
    mean: Tensor,
    rstd: Tensor,
    pre: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients that are needed, of x, norm_weight, norm_bias, w1, b1, w2, b2 and scale."""
    grad, factor = rows_of(grad_out), scale_of(scale, per_sample, x)
    hidden, gelu_in, result = pre, True, []
    if any(needs[:5]):
        if needs[5] or needs[7]:
            hidden, gelu_in = torch.empty_like(pre), False
        # The product's last step reads `pre` and makes gelu and its derivative of it, for all that follows.
        grad_pre = input_gradient(grad, factor, w2, torch.empty_like(pre), pre, None if gelu_in else hidden)
        result = layer_norm_linear.backward_of_linear(
            rows_of(grad_pre), x, norm_weight, norm_bias, w1, False, mean, rstd, needs, grad
        )
    result += parameter_gradients(grad, factor, rows_of(hidden), w2, needs[5], needs[6], gelu_in=gelu_in)
    if needs[7]:
        assert scale is not None
        result.append(linear_residual.scale_gradient(grad, rows_of(hidden), w2, b2, scale, factor, gelu_in))
    return result
