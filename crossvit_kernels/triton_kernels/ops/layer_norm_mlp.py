"""layer_norm_mlp: layer_norm_linear with gelu, then linear_residual onto the op's own input."""

from typing import Any

import torch
from torch import Tensor

from ..views import Linear, rows_of, scale_of
from . import layer_norm_linear, linear_residual
from .linear import input_gradient, parameter_gradients


def forward(call: Any) -> tuple[Tensor, ...]:
    """(out, mean, rstd, pre) of the op, the last three without rows unless `save`."""
    x, second = call.x, Linear(call.w2, call.b2)
    hidden, *saved = layer_norm_linear.launch_forward(x, call, Linear(call.w1, call.b1), gelu_in=False, gelu_out=True)
    out = call.w1.new_empty(x.shape, dtype=torch.promote_types(x.dtype, call.w1.dtype))
    linear_residual.launch_forward(rows_of(hidden), second, rows_of(x), scale_of(call.scale, call.per_sample, x), out)
    return out, *saved


def backward(call: Any) -> list[Tensor]:
    """The gradients that are needed, of x, norm_weight, norm_bias, w1, b1, w2, b2 and scale."""
    grad, factor, pre, needs = (
        rows_of(call.grad_out),
        scale_of(call.scale, call.per_sample, call.x),
        call.pre,
        call.needs,
    )
    hidden, gelu_in, result = pre, True, []
    if any(needs[:5]):
        if needs[5] or needs[7]:
            hidden, gelu_in = torch.empty_like(pre), False
        # The product's last step reads `pre` and makes gelu and its derivative of it, for all that follows.
        grad_pre = input_gradient(grad, factor, call.w2, torch.empty_like(pre), pre, None if gelu_in else hidden)
        result = layer_norm_linear.backward_of_linear(rows_of(grad_pre), call, call.w1, False, needs, grad)
    rows = rows_of(hidden)
    result += parameter_gradients(grad, factor, rows, call.w2, needs[5:7], gelu_in=gelu_in)
    if needs[7]:
        second = Linear(call.w2, call.b2)
        result.append(linear_residual.scale_gradient(grad, rows, second, call.scale, factor, gelu_in))
    return result
