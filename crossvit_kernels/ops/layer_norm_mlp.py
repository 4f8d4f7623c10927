"""layer_norm_mlp: x + scale * Linear2(gelu(Linear1(LayerNorm(x)))), the MLP half of a pre-norm block with its residual.

    pre = w1 @ LayerNorm(x) + b1                        x (..., D), w1 (hidden, D)
    out = x + scale * (w2 @ gelu(pre) + b2)             w2 (D, hidden), out (..., D)
"""

import torch.nn.functional as F
from torch import Tensor


def layer_norm_mlp_reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    eps: float = 1e-6,
    *,
    scale: Tensor | None = None,
) -> Tensor:
    """layer_norm_mlp in plain PyTorch."""
    y = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
    y = F.linear(F.gelu(F.linear(y, w1, b1)), w2, b2)
    return x + (y if scale is None else scale * y)


def layer_norm_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    eps: float = 1e-6,
    *,
    scale: Tensor | None = None,
    kernels: str = "auto",
) -> Tensor:
    return layer_norm_mlp_reference(x, norm_weight, norm_bias, w1, b1, w2, b2, eps, scale=scale)
