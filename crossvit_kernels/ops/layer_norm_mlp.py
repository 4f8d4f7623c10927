"""layer_norm_mlp: x + scale · Linear2(gelu(Linear1(LayerNorm(x)))), the MLP half of a pre-norm block with its residual.

pre = w1 LayerNorm(x) + b1                          x (..., D), w1 (hidden, D)
out = x + scale ∘ (w2 gelu(pre) + b2)               w2 (D, hidden), out (..., D)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch.call import call, needs_reference
from ..dispatch.register import register
from ..dispatch.spec import Argument, LinearParams, NormParams, OpSpec, Result, Shapes
from . import validate
from .layer_norm import layer_norm
from .layer_norm_linear import norm_statistics


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
    y = layer_norm(x, norm_weight, norm_bias, eps)
    y = F.linear(F.gelu(F.linear(y, w1, b1)), w2, b2)
    return x + (y if scale is None else scale * y)


def _save(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, w1: Tensor, b1: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    pre = F.linear(layer_norm(x, norm_weight, norm_bias, eps), w1, b1)
    return *norm_statistics(x, eps), pre.reshape(-1, w1.shape[0])


_NORM, _FIRST, _SECOND = NormParams("norm_weight", "norm_bias"), LinearParams("w1", "b1"), LinearParams("w2", "b2")


def _shapes(x: Tensor, w1: Tensor, scale: Tensor | None, per_sample: bool) -> Shapes:
    validate.tensor("x", x, "(..., D)")
    validate.tensor("w1", w1, "(hidden, D)")
    width, hidden = x.shape[-1], w1.shape[0]
    validate.positive("w1's rows", hidden)
    return {
        "x": x.shape,
        **_NORM.shapes(width),
        **_FIRST.shapes(hidden, width),
        **_SECOND.shapes(width, hidden),
        "scale": validate.scale_shape(scale, per_sample, x, width),
    }


def _results(x: Tensor, w1: Tensor) -> tuple[Result, ...]:
    rows = math.prod(x.shape[:-1])
    out, statistics = (x.shape, torch.promote_types(x.dtype, w1.dtype)), ((rows,), torch.float32)
    return out, statistics, statistics, ((rows, w1.shape[0]), w1.dtype)


def _flops(backend: str, x: Tensor, w1: Tensor) -> int:
    return 4 * math.prod(x.shape[:-1]) * w1.shape[0] * w1.shape[1]


def _backward_flops(backend: str, needs: dict[str, bool], x: Tensor, w1: Tensor) -> int:
    below = needs["x"] or needs["norm_weight"] or needs["norm_bias"]  # the gradient passes both matrices
    hidden = below or needs["w1"] or needs["b1"]
    return (below + hidden + needs["w1"] + needs["w2"] + needs["scale"]) * _flops(backend, x, w1) // 2


_op = register(
    OpSpec(
        "layer_norm_mlp",
        [
            Argument("x", activation=True),
            _NORM,
            _FIRST,
            _SECOND,
            Argument("eps", "float"),
            Argument("scale", "Tensor?"),
            Argument("per_sample", "bool"),  # what `scale` is, decided once, below
        ],
        computes_in="w1",
        reference=layer_norm_mlp_reference,
        shapes=_shapes,
        results=_results,
        flops=_flops,
        backward_flops=_backward_flops,
        saved=("mean", "rstd", "pre"),  # (M,) float32 twice; (M, hidden), the first Linear's output
        save=_save,
    )
)


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
    """x + scale · Linear2(gelu(Linear1(LayerNorm(x)))).

    Args:
        x: (..., D), floating point, any strides.
        norm_weight, norm_bias: (D,), as nn.LayerNorm holds them, in x's dtype or float32; the bias may be None.
        w1, b1: (hidden, D) and (hidden,), w2, b2: (D, hidden) and (D,), as nn.Linear holds them; either bias may be
            None.
        eps: added to LayerNorm's variance.
        scale: None, or a factor per sample, (B, 1, ..., 1) with as many dimensions as x (drop path), or per channel,
            (D,) (LayerScale).
        kernels: the backend, see `crossvit_kernels.backends`.

    Returns:
        x's shape, in the dtype to which x, scale and the Linears promote.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value is wrong; RuntimeError: the backend
            asked for is not there.
    """
    validate.tensor("x", x, "(..., D)")
    width = x.shape[-1]
    validate.positive("x's width", width)
    validate.norm("norm_weight", norm_weight, "norm_bias", norm_bias, (width,), "x", x)
    hidden = validate.matrix("w1", w1, "b1", b1, width, "x", x)
    validate.linear("w2", w2, "b2", b2, (width, hidden), "x", x)
    validate.epsilon(eps)
    per_sample = scale is not None and validate.scale(scale, x, width)
    if needs_reference(_op, (x, norm_weight, norm_bias, w1, b1, w2, b2, eps, scale, per_sample), kernels):
        return layer_norm_mlp_reference(x, norm_weight, norm_bias, w1, b1, w2, b2, eps, scale=scale)
    x, scale = validate.promoted(x, scale, w1)
    return call(_op, (x, norm_weight, norm_bias, w1, b1, w2, b2, eps, scale, per_sample), kernels)
