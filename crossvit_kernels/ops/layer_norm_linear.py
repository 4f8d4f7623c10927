"""layer_norm_linear: act(Linear(pre_act(LayerNorm(x)))), a pre-norm block's way into its matrix multiplication.

    x̂   = (x - mean(x)) · rstd(x)                    over the last dimension, x (..., D)
    y   = γ ∘ x̂ + β                                  γ, β: norm_weight, norm_bias (D,)
    pre = weight pre_act(y) + bias                   weight (E, D)
    out = act(pre)                                   (..., E)

The queries, keys and values of a ViT block use neither activation, the first half of its MLP activation="gelu",
CrossViT's projections of the CLS token pre_activation="gelu" (arXiv 2103.14899, eq. 5 and 7: f and g; `projs` and
`revert_projs` in the authors' models/crossvit.py).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch.call import call, needs_reference
from ..dispatch.register import register
from ..dispatch.spec import Argument, LinearParams, NormParams, OpSpec, Result, Shapes
from . import validate
from .layer_norm import layer_norm


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
    y = layer_norm(x, norm_weight, norm_bias, eps)
    if pre_activation == "gelu":
        y = F.gelu(y)
    out = F.linear(y, weight, bias)
    return F.gelu(out) if activation == "gelu" else out


def norm_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """LayerNorm's mean and rstd for every row of x (..., D), both (M,) float32."""
    variance, mean = torch.var_mean(x.reshape(-1, x.shape[-1]).float(), dim=-1, correction=0)
    return mean, (variance + eps).rsqrt()


def _reference(*inputs: Any) -> Tensor:
    *given, gelu_in, gelu_out = inputs
    before, behind = ("gelu" if gelu else None for gelu in (gelu_in, gelu_out))
    return layer_norm_linear_reference(*given, pre_activation=before, activation=behind)


def _save(*inputs: Any) -> tuple[Tensor, ...]:
    *others, gelu_out = inputs
    x, _norm_weight, _norm_bias, weight, _bias, eps, _gelu_in = others
    pre = _reference(*others, False) if gelu_out else weight.new_empty((0, weight.shape[0]))
    return *norm_statistics(x, eps), pre.reshape(-1, weight.shape[0])


_NORM, _LINEAR = NormParams("norm_weight", "norm_bias"), LinearParams("weight", "bias")


def _shapes(x: Tensor, weight: Tensor) -> Shapes:
    validate.tensor("x", x, "(..., D)")
    validate.tensor("weight", weight, "(E, D)")
    width, features = x.shape[-1], weight.shape[0]
    validate.positive("weight's rows", features)
    return {"x": x.shape, **_NORM.shapes(width), **_LINEAR.shapes(features, width)}


def _results(x: Tensor, weight: Tensor, gelu_out: bool) -> tuple[Result, ...]:
    rows, features = math.prod(x.shape[:-1]), weight.shape[0]
    statistics = ((rows,), torch.float32)
    pre = ((rows if gelu_out else 0, features), weight.dtype)
    return ((*x.shape[:-1], features), weight.dtype), statistics, statistics, pre


def _flops(backend: str, x: Tensor, weight: Tensor) -> int:
    return 2 * math.prod(x.shape[:-1]) * weight.shape[0] * weight.shape[1]


def _backward_flops(backend: str, needs: dict[str, bool], x: Tensor, weight: Tensor) -> int:
    through_matrix = needs["x"] or needs["norm_weight"] or needs["norm_bias"]
    return (through_matrix + needs["weight"]) * _flops(backend, x, weight)


_op = register(
    OpSpec(
        "layer_norm_linear",
        [
            Argument("x", activation=True),
            _NORM,
            _LINEAR,
            Argument("eps", "float"),
            Argument("gelu_in", "bool"),  # whether pre_activation is "gelu"
            Argument("gelu_out", "bool"),  # whether activation is
        ],
        computes_in="weight",
        reference=_reference,
        shapes=_shapes,
        results=_results,
        flops=_flops,
        backward_flops=_backward_flops,
        # mean and rstd are (M,) float32; pre, the Linear's output, is (M, E) where an activation follows, else (0, E).
        saved=("mean", "rstd", "pre"),
        save=_save,
    )
)


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
    """act(Linear(pre_act(LayerNorm(x)))).

    Args:
        x: (..., D), floating point, any strides.
        norm_weight, norm_bias: (D,), as nn.LayerNorm holds them, in x's dtype or float32; the bias may be None.
        weight, bias: (E, D) and (E,), as nn.Linear holds them; the bias may be None.
        eps: added to LayerNorm's variance.
        pre_activation, activation: None or "gelu" (by erf), before and after the Linear.
        kernels: the backend, see `crossvit_kernels.backends`.

    Returns:
        (..., E) in x's dtype; under autocast in autocast's.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value is wrong; RuntimeError: the backend
            asked for is not there.
    """
    validate.tensor("x", x, "(..., D)")
    width = x.shape[-1]
    validate.positive("x's width", width)
    validate.norm("norm_weight", norm_weight, "norm_bias", norm_bias, (width,), "x", x)
    validate.matrix("weight", weight, "bias", bias, width, "x", x)
    validate.epsilon(eps)
    gelu_in = validate.activation("pre_activation", pre_activation)
    gelu_out = validate.activation("activation", activation)
    inputs = (x, norm_weight, norm_bias, weight, bias, eps, gelu_in, gelu_out)
    if needs_reference(_op, inputs, kernels):
        return _reference(*inputs)
    return call(_op, inputs, kernels)
