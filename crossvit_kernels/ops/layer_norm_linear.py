"""layer_norm_linear: act(Linear(pre_act(LayerNorm(x)))), a pre-norm block's way into its matrix multiplication.

    y   = (x - mean(x)) * rstd(x) * norm_weight + norm_bias        over the last dimension, x (..., D)
    pre = weight @ pre_act(y) + bias                               weight (E, D)
    out = act(pre)                                                 (..., E)

The queries, keys and values of a ViT block use neither activation, the first half of its MLP activation="gelu", CrossViT's projections of
the CLS token pre_activation="gelu" (arXiv 2103.14899, eq. 5 and 7: f and g; `projs` and `revert_projs` in the authors' models/crossvit.py).
"""

import torch.nn.functional as F
from torch import Tensor


def layer_norm_linear_reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    pre_activation: str | None = None,
    activation: str | None = None,
) -> Tensor:
    """layer_norm_linear in plain PyTorch."""
    y = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
    if pre_activation == "gelu":
        y = F.gelu(y)
    out = F.linear(y, weight, bias)
    return F.gelu(out) if activation == "gelu" else out


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    pre_activation: str | None = None,
    activation: str | None = None,
    kernels: str = "auto",
) -> Tensor:
    return layer_norm_linear_reference(
        x, norm_weight, norm_bias, weight, bias, eps, pre_activation=pre_activation, activation=activation
    )
