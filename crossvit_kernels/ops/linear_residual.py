"""linear_residual: residual + scale * Linear(x), a pre-norm block's way back onto its residual stream.

    out = residual + scale * (weight @ x + bias)        x (..., K), weight (E, K), residual and out (..., E)
"""

import torch.nn.functional as F
from torch import Tensor


def linear_residual_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *, scale: Tensor | None = None
) -> Tensor:
    """linear_residual in plain PyTorch."""
    y = F.linear(x, weight, bias)
    return residual + (y if scale is None else scale * y)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    scale: Tensor | None = None,
    kernels: str = "auto",
) -> Tensor:
    return linear_residual_reference(x, weight, bias, residual, scale=scale)
