"""Under autocast an op does what its reference does: matrix operands in autocast's dtype, the rest by promotion."""

from typing import Any

import pytest
import torch
from torch import Tensor

import crossvit_kernels
import inputs
from crossvit_kernels.dispatch.register import OPS
from inputs import DIFFERENTIABLE, EXAMPLES, Random
from numerics import AUTOCAST, FLOAT32, Precision, evaluate, place


def close(value: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, wanted in expected.items():
        assert value[name].dtype == wanted.dtype, name
        scale = wanted.float().abs().max().item()
        torch.testing.assert_close(
            value[name], wanted, rtol=0, atol=tolerance * max(scale, 1e-2), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "given_dtype, dtype",
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("name", EXAMPLES)
def test_dtypes_and_values_are_the_references(
    backend: str, name: str, given_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    op, precision = getattr(crossvit_kernels, name), Precision("autocast", given_dtype, dtype)
    differentiable = name in DIFFERENTIABLE
    value, expected = (
        evaluate(op, EXAMPLES[name](), precision, k, gradients=differentiable) for k in (backend, "reference")
    )
    for result in (value, expected):
        result.pop("grad k_bias", None)
    close(value, expected, 3e-2)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_disabled_region_inside_computes_in_the_inputs_dtype(backend: str, name: str) -> None:
    op = getattr(crossvit_kernels, name)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        inside = evaluate(op, EXAMPLES[name](), FLOAT32, backend)
    for key, value in evaluate(op, EXAMPLES[name](), FLOAT32, backend).items():
        assert torch.equal(inside[key], value)


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_backward_inside_the_region_is_the_one_outside(name: str, kernels: str) -> None:
    """The gradient does not depend on whether autocast is on when backward() runs."""
    op = getattr(crossvit_kernels, name)
    given = {n: v.requires_grad_() if isinstance(v, Tensor) else v for n, v in EXAMPLES[name]().items()}
    leaves = [v for v in given.values() if isinstance(v, Tensor)]
    with torch.autocast("cpu", torch.bfloat16):
        out = op(**given, kernels=kernels)
        inside = torch.autograd.grad(out.float().sum(), leaves, retain_graph=True)
    outside = torch.autograd.grad(out.float().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside))


@pytest.mark.parametrize("name", [n for n in DIFFERENTIABLE if OPS[n].parameters])
def test_gradients_of_float32_parameters_are_not_rounded(name: str) -> None:
    """The kernels sum them in float32; a parameter that is not float32 has a gradient of its own dtype beside them."""
    op = getattr(crossvit_kernels, name)
    first, *rest = [OPS[name].inputs[i] for i in OPS[name].parameters]
    for narrow in [None, *rest[:1]]:
        given = EXAMPLES[name]()
        if narrow is not None:
            given[narrow] = given[narrow].bfloat16()
        leaves = {n: given[n].requires_grad_() for n in (first, *rest)}
        with torch.autocast("cpu", torch.bfloat16):
            out = op(**given, kernels="cpu")
        grads = dict(zip(leaves, torch.autograd.grad(out.float().square().sum(), list(leaves.values()))))
        assert {n: g.dtype for n, g in grads.items()} == {n: v.dtype for n, v in leaves.items()}
        assert not torch.equal(grads[first], grads[first].bfloat16().float())


@pytest.mark.parametrize("which", ["cls", "patches"])
def test_cls_and_patches_in_two_dtypes(backend: str, which: str) -> None:
    """A projection under autocast gives a bfloat16 CLS for float32 patches: they meet in float32, as in torch.cat."""
    given = inputs.cls_cross_attention(Random(), 3, 20, 96, 3)
    given[which] = given[which].bfloat16()
    given = place(given, backend)
    tensors = {n: v.requires_grad_() for n, v in given.items() if isinstance(v, Tensor) and n != "k_bias"}
    results = []
    for kernels in (backend, "reference"):
        with torch.autocast(given["cls"].device.type, torch.bfloat16):
            out = crossvit_kernels.cls_cross_attention(**given, kernels=kernels)
        grads = torch.autograd.grad(out.float().square().sum(), list(tensors.values()))
        results.append({"out": out, **dict(zip(tensors, grads))})
    close(*results, 3e-2)


def test_a_bfloat16_residual_stays_bfloat16(backend: str) -> None:
    given = inputs.linear_residual(Random(), 2, 5, 96, out=64) | {"x": torch.randn(2, 5, 96)}
    given["residual"] = given["residual"].bfloat16()
    given = place(given, backend)
    with torch.autocast(given["x"].device.type, torch.bfloat16):
        out, expected = (crossvit_kernels.linear_residual(**given, kernels=k) for k in (backend, "reference"))
    assert out.dtype == expected.dtype == torch.bfloat16
    close({"out": out}, {"out": expected}, 2e-2)


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_float64_is_left_alone(kernels: str) -> None:
    for name, example in EXAMPLES.items():
        given: dict[str, Any] = {n: v.double() if isinstance(v, Tensor) else v for n, v in example().items()}
        op = getattr(crossvit_kernels, name)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(op(**given, kernels=kernels), op(**given, kernels="reference"))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_compiled_under_autocast(backend: str, name: str) -> None:
    torch._dynamo.reset()
    op = getattr(crossvit_kernels, name)
    compiled = torch.compile(lambda given: op(**given, kernels=backend), fullgraph=True, backend="aot_eager")
    eager = evaluate(op, EXAMPLES[name](), AUTOCAST, backend)
    traced = evaluate(lambda kernels, **given: compiled(given), EXAMPLES[name](), AUTOCAST, backend)
    close(traced, eager, 2e-2)
