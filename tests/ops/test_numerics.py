"""The rule for "equal": what is wrong is found, by numbers that no machine has a part in, and what is right is not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import crossvit_kernels
import inputs
from inputs import Random
from numerics import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    Draw,
    Precision,
    Results,
    evaluate,
    exact,
    judge,
    nearby,
    simulated,
)
from rounding import Rounded, chained

Op = Callable[..., Tensor]


def held(op: Op, given: dict[str, Any], precision: Precision, kernel: Callable[[dict[str, Any]], Results]) -> Any:
    """The ratios of error to bound of what `kernel` makes of the inputs."""

    def draw(number: int) -> Draw:
        values = nearby(given, precision, number)
        return Draw(kernel(values), (simulated(op, values, precision),), exact(op, values, precision))

    return judge(draw, precision.ulp, zero={"grad k_bias": 0.1}, draws=(2,))


def cut(x: Tensor, bits: int) -> Tensor:
    """Float32 x with `bits` bits behind the point, rounded to nearest."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2.0 ** (bits + 1)).round(), exponent - bits - 1)


# Faults of arithmetic: the reference under another one, forward and backward.
class CutProducts(Rounded):
    """Matrices are rounded to a format with fewer bits first."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        return super().multiply(cut(a, self.bits), cut(b, self.bits))


class NarrowSums(Rounded):
    """Products of 16-bit numbers are added up in 16 bits."""

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        terms = a.permute(2, 0, 1)[..., None] * b.permute(1, 0, 2)[:, :, None]
        return chained(terms, len(terms))

    def addmm(self, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return bias + self.multiply(a[None], b[None])[0]


class OneRowCut(Rounded):
    """The last row of a product is made in TF32."""

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        out = super().multiply(a, b)
        out[:, -1:] = super().multiply(cut(a[:, -1:], 10), cut(b, 10))
        return out


class WithoutTheShift(Rounded):
    """LayerNorm's two passes over x itself, not over x - x[0]."""

    def statistics(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        mean = self.mean(x)
        return mean, (self.mean((x - mean).square()) + eps).rsqrt()


class OnePass(Rounded):
    """The variance as the mean of the squares less the square of the mean."""

    def statistics(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        mean = self.mean(x)
        return mean, ((self.mean(x.square()) - mean.square()).clamp(min=0) + eps).rsqrt()


class SampleVariance(Rounded):
    """The variance over n - 1."""

    def statistics(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        mean, rstd = super().statistics(x, eps)
        return mean, ((rstd**-2 - eps) * (x.shape[-1] / (x.shape[-1] - 1)) + eps).rsqrt()


class NarrowStatistics(Rounded):
    """Mean and rstd in bfloat16."""

    def statistics(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        mean, rstd = super().statistics(x, eps)
        return mean.bfloat16().float(), rstd.bfloat16().float()


class ALostRow(Rounded):
    """Sums over rows, as a bias's gradient, leave the last row out."""

    def sum(self, x: Tensor, dims: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
        if list(dims or []) != [x.dim() - 1]:
            x = x.narrow(dims[-1] if dims else 0, 0, x.shape[dims[-1] if dims else 0] - 1)
        return super().sum(x, dims, keepdim, dtype=dtype)


class HalvesNotRescaled(Rounded):
    """Softmax in two blocks of keys, whose second maximum does not reach the first block's sums."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        scores = self.scores(q, k, None)
        half = scores.shape[-1] // 2
        first, largest = scores[..., :half].amax(-1, keepdim=True), scores.amax(-1, keepdim=True)
        p = torch.cat([scores[..., :half] - first, scores[..., half:] - largest], dim=-1).exp()
        total = p.sum(-1, keepdim=True)
        return self.wide_product(p, v) / total, (largest + total.log())[..., 0]


NORM = "layer_norm_linear"


def norm(kind: str = "plain", width: int = 96) -> dict[str, Any]:
    return inputs.layer_norm_linear(Random(), 2, 9, width, out=48, kind=kind)


def attention() -> dict[str, Any]:
    return inputs.self_attention(Random(), 2, 40, 96, 3)


ARITHMETIC: dict[str, tuple[str, Callable[[], dict[str, Any]], Precision, Callable[[], Rounded]]] = {
    "a sum of 1152 in one chain": (NORM, lambda: norm(width=1152), FLOAT32, lambda: Rounded(1152)),
    "a product in TF32": (NORM, norm, FLOAT32, lambda: CutProducts(10)),
    "a product in bfloat16": (NORM, norm, FLOAT32, lambda: CutProducts(7)),
    "a product with five bits less": (NORM, norm, FLOAT32, lambda: CutProducts(18)),
    "a row in TF32": (NORM, norm, FLOAT32, OneRowCut),
    "sums in bfloat16": (NORM, lambda: norm(width=3072), BFLOAT16, NarrowSums),
    "sums in float16": (NORM, lambda: norm(width=3072), FLOAT16, NarrowSums),
    "two passes without the shift": (NORM, lambda: norm("constant tokens"), FLOAT32, WithoutTheShift),
    "one pass": (NORM, lambda: norm("far mean"), FLOAT32, OnePass),
    "a variance over n - 1": (NORM, norm, FLOAT32, SampleVariance),
    "a variance over n - 1 in bfloat16": (NORM, lambda: norm(width=24), BFLOAT16, SampleVariance),
    "statistics in bfloat16": (NORM, norm, FLOAT32, NarrowStatistics),
    "statistics in bfloat16, far from zero": (NORM, lambda: norm("far mean"), BFLOAT16, NarrowStatistics),
    "a lost row in a sum": (NORM, norm, BFLOAT16, ALostRow),
    "a softmax not rescaled": ("self_attention", attention, FLOAT32, HalvesNotRescaled),
}


@pytest.mark.parametrize("fault", ARITHMETIC)
def test_a_fault_of_arithmetic_is_found(fault: str) -> None:
    name, make, precision, mode = ARITHMETIC[fault]
    op, given = getattr(crossvit_kernels, name), make()

    def kernel(values: dict[str, Any]) -> Results:
        with mode():
            return evaluate(op, values, precision, "reference")

    with pytest.raises(AssertionError, match="of their bounds"):
        held(op, given, precision, kernel)


# Faults of formulas: another op in the place of the reference.
def without_gamma(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, **_: Any) -> Tensor:
    return F.linear(F.layer_norm(x, norm_weight.shape) + 0 * norm_weight + norm_bias, weight, bias)


class GammaForgotten(torch.autograd.Function):
    """x times gamma, whose gradient of x leaves gamma out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * gamma

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        return grad, (grad * x).sum(dim=(0, 1))


def gradient_without_gamma(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, **_: Any
) -> Tensor:
    y = GammaForgotten.apply(F.layer_norm(x, norm_weight.shape, eps=1e-6), norm_weight)
    return F.linear(y + norm_bias, weight, bias)


def a_wrong_row(*args: Any, **given: Any) -> Tensor:
    out = crossvit_kernels.layer_norm_linear(*args, **given)
    return torch.cat([out[:, :3], out[:, 4:5], out[:, 4:]], dim=1)


def a_wrong_column(weight: Tensor, **given: Any) -> Tensor:
    """The last feature does without the last product."""
    shorter = torch.cat([weight[:-1], F.pad(weight[-1:, :-1], (0, 1))])
    return crossvit_kernels.layer_norm_linear(weight=shorter, **given)


def another_eps(**given: Any) -> Tensor:
    return crossvit_kernels.layer_norm_linear(**given, eps=1e-5)


def eps_outside_of_the_root(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, **_: Any
) -> Tensor:
    deviation = x.var(-1, keepdim=True, correction=0).sqrt() + 1e-6
    return F.linear((x - x.mean(-1, keepdim=True)) / deviation * norm_weight + norm_bias, weight, bias)


def gelu_by_tanh(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, **_: Any) -> Tensor:
    y = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, 1e-6)
    return F.gelu(F.linear(y, weight, bias), approximate="tanh")


def wrong_heads(qkv: Tensor, num_heads: int, **given: Any) -> Tensor:
    """Every head's query meets the keys of the next one."""
    q, k, v = qkv.chunk(3, dim=-1)
    k = k.unflatten(-1, (num_heads, -1)).roll(1, dims=-2).flatten(-2)
    return crossvit_kernels.self_attention(torch.cat([q, k, v], dim=-1), num_heads, **given)


def scaled_by_the_width(qkv: Tensor, num_heads: int, **given: Any) -> Tensor:
    q, k, v = qkv.chunk(3, dim=-1)
    return crossvit_kernels.self_attention(torch.cat([q * num_heads**-0.5, k, v], dim=-1), num_heads, **given)


def without_the_last_key(qkv: Tensor, num_heads: int, **given: Any) -> Tensor:
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
    return F.scaled_dot_product_attention(q, k[:, :, :-1], v[:, :, :-1]).transpose(1, 2).flatten(2)


def residual_scaled_too(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, scale: Tensor, **_: Any) -> Tensor:
    return scale * (residual + F.linear(x, weight, bias))


def without_the_last_patch(patches: Tensor, **given: Any) -> Tensor:
    return crossvit_kernels.cls_cross_attention(patches=patches[:, :-1], **given)


def the_patches_query(cls: Tensor, patches: Tensor, **given: Any) -> Tensor:
    """The first patch in the place of the CLS token."""
    swapped = torch.cat([cls[:, None], patches[:, 1:]], dim=1)
    return crossvit_kernels.cls_cross_attention(patches[:, 0], swapped, **given)


def a_bias_twice(weight: Tensor, bias: Tensor, **given: Any) -> Tensor:
    return crossvit_kernels.patch_embed(weight=weight, bias=2 * bias, **given)


def corners_aligned(images: Tensor, image_size: tuple[int, int], **_: Any) -> Tensor:
    return F.interpolate(images, image_size, mode="bicubic", align_corners=True)


FORMULAS: dict[str, tuple[str, Op, Callable[[], dict[str, Any]]]] = {
    "no gamma": (NORM, without_gamma, norm),
    "no gamma in the gradient of x": (NORM, gradient_without_gamma, norm),
    "a wrong row": (NORM, a_wrong_row, norm),
    "a product less in a column": (NORM, a_wrong_column, norm),
    "another eps": (NORM, another_eps, lambda: norm() | {"x": 0.02 * Random().normal(2, 9, 96)}),
    "eps outside of the root": (
        NORM,
        eps_outside_of_the_root,
        lambda: norm() | {"x": 0.02 * Random().normal(2, 9, 96)},
    ),
    "gelu by tanh": (NORM, gelu_by_tanh, lambda: norm() | {"activation": "gelu"}),
    "wrong heads": ("self_attention", wrong_heads, attention),
    "scores scaled by the width": ("self_attention", scaled_by_the_width, attention),
    "the last key left out": ("self_attention", without_the_last_key, attention),
    "the residual scaled": (
        "linear_residual",
        residual_scaled_too,
        lambda: inputs.linear_residual(Random(), 20, 5, 96, out=48, scale="channel"),
    ),
    "the last patch left out": (
        "cls_cross_attention",
        without_the_last_patch,
        lambda: inputs.cls_cross_attention(Random(), 3, 60, 96, 3),
    ),
    "another token's query": (
        "cls_cross_attention",
        the_patches_query,
        lambda: inputs.cls_cross_attention(Random(), 3, 20, 96, 3),
    ),
    "a bias twice": ("patch_embed", a_bias_twice, lambda: inputs.patch_embed(Random(), 2, 12, 16, patch=4, embed=24)),
    "corners aligned": (
        "bicubic_resize",
        corners_aligned,
        lambda: inputs.bicubic_resize(Random(), 2, 12, 16, (18, 21)),
    ),
}
BELOW_BFLOAT16 = ("eps outside of the root", "gelu by tanh")


@pytest.mark.parametrize(
    "fault, precision",
    [(fault, p) for fault in FORMULAS for p in (FLOAT32, BFLOAT16) if p == FLOAT32 or fault not in BELOW_BFLOAT16],
    ids=str,
)
def test_a_fault_of_the_formula_is_found(fault: str, precision: Precision) -> None:
    name, wrong, make = FORMULAS[fault]
    op, given = getattr(crossvit_kernels, name), make()
    with pytest.raises(AssertionError, match="of their bounds"):
        held(op, given, precision, lambda values: evaluate(wrong, values, precision, "reference"))
