"""The tests' quicker interpreter computes what Triton's own does."""

import pytest
import torch

import interpreter
from available import GPU
from crossvit_kernels import layer_norm_mlp
from inputs import Random

pytestmark = pytest.mark.skipif(GPU, reason="kernels are compiled for the GPU, not interpreted")


def gradients(rng: Random) -> tuple[torch.Tensor, ...]:
    """An op with nested device functions, reductions and products, forward and backward."""
    sizes = ((9, 40), (40,), (40,), (24, 40), (24,), (40, 24), (40,))  # x and its norm, two Linears
    inputs = [rng.normal(*size).requires_grad_() for size in sizes]
    y = layer_norm_mlp(*inputs, kernels="triton")
    return (y, *torch.autograd.grad(y.square().sum(), inputs))


def test_the_bits_are_those_of_tritons_own(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = gradients(Random())
    assert interpreter.BEFORE, "Triton's interpreter is made otherwise than those that are known"
    for name, value in interpreter.BEFORE.items():
        monkeypatch.setattr(f"triton.runtime.interpreter.{name}", value)
    own = gradients(Random())
    assert all(torch.equal(a, b) for a, b in zip(quick, own, strict=True))
