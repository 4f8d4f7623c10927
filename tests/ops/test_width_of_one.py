"""A row of one element has no variance: LayerNorm makes it its bias, whatever it is, so that the gradient of x is zero,
which every kernel returns as zero, on every instruction set."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import crossvit_kernels as k
from available import instruction_set, instruction_sets
from crossvit_kernels import backends
from inputs import Random
from numerics import DEVICES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = 50


def _linear(rng: Random, x: Tensor, kernels: str, **options: str) -> Tensor:
    norm, (weight, bias) = rng.norm(1), rng.linear(7, 1)
    return k.layer_norm_linear(x, *like(x, *norm, weight, bias), kernels=kernels, **options)


def _mlp(rng: Random, x: Tensor, kernels: str) -> Tensor:
    norm, first, second = rng.norm(1), rng.linear(9, 1), rng.linear(1, 9)
    return k.layer_norm_mlp(x, *like(x, *norm, *first, *second), kernels=kernels)


def _attention(rng: Random, x: Tensor, kernels: str) -> Tensor:
    weights = like(x, *rng.norm(1), *(w for _ in "qkv" for w in rng.linear(1, 1)))
    return k.cls_cross_attention(x[:5], x[5:].view(5, -1, 1), *weights, 1, kernels=kernels)


def like(x: Tensor, *given: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().to(x) for t in given]


OPS: dict[str, Callable[[Random, Tensor, str], Tensor]] = {
    "linear": _linear,
    "gelu before": lambda *given: _linear(*given, pre_activation="gelu"),
    "gelu behind": lambda *given: _linear(*given, activation="gelu"),
    "mlp": _mlp,
    "attention": _attention,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_gradient_is_zero(backend: str, op: str, dtype: torch.dtype) -> None:
    """To the bit; of layer_norm_mlp what is left is its residual's."""
    if dtype not in backends.dtypes(backend):
        pytest.skip(f"{backend} does not compute in {dtype} here")
    for name in instruction_sets() if backend == "cpu" else [""]:
        with instruction_set(name) if name else nullcontext():
            rng = Random()
            x = rng.normal(ROWS, 1, std=3.0).to(DEVICES[backend], dtype).requires_grad_()
            out = OPS[op](rng, x, backend)
            grad_out = rng.normal(*out.shape).to(out)
            out.backward(grad_out)
            expected = grad_out if op == "mlp" else torch.zeros_like(x)
            assert torch.equal(x.grad, expected), name
            assert out.isfinite().all()
