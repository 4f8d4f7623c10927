"""Many gradients of an output at once, and derivatives of derivatives of the reference, are plain PyTorch's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_registration import dispatcher_inputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import crossvit_kernels
from available import NATIVE
from crossvit_kernels.dispatch.register import OPS
from inputs import DIFFERENTIABLE, EXAMPLES, Random
from numerics import AUTOCAST, DEVICES, FLOAT32, Precision

# torch's attention on a CPU has no batching rule, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def leaves_of(name: str, kernels: str) -> tuple[dict[str, Any], list[Tensor]]:
    """The example's arguments, where `kernels` is tested, and those that are tensors, which require gradients."""
    device = DEVICES.get(kernels, "cpu")
    given = {n: v.to(device).requires_grad_() if isinstance(v, Tensor) else v for n, v in EXAMPLES[name]().items()}
    return given, [v for v in given.values() if isinstance(v, Tensor)]


def assert_same(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == wanted.dtype
        scale = max(wanted.abs().max().item(), 1.0)
        torch.testing.assert_close(value, wanted, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("precision", [FLOAT32, AUTOCAST], ids=str)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_is_grads_batched(backend: str, name: str, precision: Precision) -> None:
    """Each of the gradients is the one that a call of its own gives, to every input; autocast's casts included."""
    given, leaves = leaves_of(name, backend)
    with precision.context(leaves[0].device.type):
        out = getattr(crossvit_kernels, name)(**given, kernels="reference")
        fused = getattr(crossvit_kernels, name)(**given, kernels=backend)
    grad_outs = Random(1).normal(3, *out.shape).to(out)
    expected = torch.autograd.grad(out, leaves, grad_outs, is_grads_batched=True, retain_graph=True)
    tolerance = 1e-5 if precision is FLOAT32 else 3e-2
    for create_graph in (False, True):
        found = torch.autograd.grad(
            fused, leaves, grad_outs, is_grads_batched=True, retain_graph=True, create_graph=create_graph
        )
        assert_same(found, expected, tolerance)
    one = torch.autograd.grad(fused, leaves, grad_outs[1], retain_graph=True)
    assert_same([g[1] for g in found], one, 1e-4 if precision is FLOAT32 else 3e-2)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_vmap_over_gradients(backend: str, name: str) -> None:
    given, leaves = leaves_of(name, backend)
    out = getattr(crossvit_kernels, name)(**given, kernels="reference")
    fused = getattr(crossvit_kernels, name)(**given, kernels=backend)
    grad_outs = Random(1).normal(3, *out.shape).to(out)
    found, expected = (
        torch.vmap(lambda g, y=y: torch.autograd.grad(y, leaves, g, retain_graph=True))(grad_outs) for y in (fused, out)
    )
    assert_same(found, expected)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_jacobians(backend: str, name: str) -> None:
    """By autograd's own, row by row and at once, forwards and backwards, and by torch.func."""
    given, _ = leaves_of(name, backend)
    first = OPS[name].inputs[OPS[name].activations[0]]
    x = given[first].detach()

    def call(kernels: str) -> Callable[[Tensor], Tensor]:
        return lambda x: getattr(crossvit_kernels, name)(**(given | {first: x}), kernels=kernels).sum(0)

    with sdpa_kernel(SDPBackend.MATH):  # the fused one has no forward-mode derivative on a CPU
        expected = torch.autograd.functional.jacobian(call("reference"), x)
        for jacobian in (
            lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
            lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True, strategy="forward-mode"),
            lambda f, x: torch.func.jacrev(f)(x),
            lambda f, x: torch.func.jacfwd(f)(x),
        ):
            torch.testing.assert_close(jacobian(call(backend), x).detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernels", ["reference", *NATIVE])
@pytest.mark.parametrize("name", ["layer_norm_linear", "linear_residual", "layer_norm_mlp", "cls_cross_attention"])
def test_hessians_by_torch_func(name: str, kernels: str) -> None:
    """Also through the kernels' names, since function transforms take plain PyTorch."""
    given, _ = leaves_of(name, kernels)
    first = OPS[name].inputs[OPS[name].activations[0]]
    x = given[first].detach()[:1]
    given |= {n: v[:1] for n, v in given.items() if (isinstance(v, Tensor) and v.dim() > 2) or n == "patches"}

    def call(x: Tensor, k: str = kernels) -> Tensor:
        return getattr(crossvit_kernels, name)(**(given | {first: x}), kernels=k).square().sum()

    expected = torch.autograd.functional.hessian(lambda x: call(x, "reference"), x)
    assert expected.abs().max() > 0
    found = torch.func.hessian(call)(x).detach()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    if kernels == "reference":
        at_once = torch.autograd.functional.hessian(lambda x: call(x, "reference"), x, vectorize=True)
        torch.testing.assert_close(at_once, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_dispatcher_ops_under_function_transforms(backend: str, name: str) -> None:
    """What an exported program holds: no derivative is dropped, backwards or forwards, and none raises."""
    op, values = OPS[name], dispatcher_inputs(name, device=DEVICES[backend])
    at = op.activations[0]
    x, tangent = values[at], torch.ones_like(values[at])

    def call(kernels: str) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            result = op.op(*values[:at], x, *values[at + 1 :], True, kernels)
            return (result[0] if op.saved else result).square().sum()

        return run

    def plain(x: Tensor) -> Tensor:
        return op.reference(*values[:at], x, *values[at + 1 :]).square().sum()

    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.grad(plain)(x)
        torch.testing.assert_close(torch.func.grad(call(backend))(x), expected, rtol=1e-4, atol=1e-4)
        along = torch.func.jvp(plain, (x,), (tangent,))[1]
        torch.testing.assert_close(torch.func.jvp(call(backend), (x,), (tangent,))[1], along, rtol=1e-4, atol=1e-3)
        with torch.autograd.forward_ad.dual_level():
            dual = call(backend)(torch.autograd.forward_ad.make_dual(x, tangent))
            found = torch.autograd.forward_ad.unpack_dual(dual).tangent
        assert found is not None
        torch.testing.assert_close(found, along, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_compiled_function_transforms(backend: str, name: str) -> None:
    torch._dynamo.reset()
    given, _ = leaves_of(name, backend)
    given = {n: v.detach() if isinstance(v, Tensor) else v for n, v in given.items()}
    first = OPS[name].inputs[OPS[name].activations[0]]

    def call(x: Tensor, kernels: str = backend) -> Tensor:
        return getattr(crossvit_kernels, name)(**(given | {first: x}), kernels=kernels).square().sum()

    expected = torch.func.grad(lambda x: call(x, "reference"))(given[first])
    found = torch.compile(torch.func.grad(call), backend="aot_eager")(given[first])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("kernels", ["auto", "cpu", "triton", "cuda"])
def test_gradcheck_in_float64(name: str, kernels: str) -> None:
    """float64 is the reference's to the bit, whichever backend is asked for, with its second derivatives."""
    if kernels != "auto" and kernels not in NATIVE:
        pytest.skip(f"kernels={kernels!r} is not available")
    device = DEVICES.get(kernels, "cpu")
    values = {n: v.double().to(device) if isinstance(v, Tensor) else v for n, v in EXAMPLES[name]().items()}
    tensors = {n: v.requires_grad_() for n, v in values.items() if isinstance(v, Tensor)}

    def call(*given: Tensor) -> Tensor:
        return getattr(crossvit_kernels, name)(**(values | dict(zip(tensors, given))), kernels=kernels)

    reference = getattr(crossvit_kernels, name)(**values, kernels="reference")
    assert torch.equal(call(*tensors.values()), reference)
    with sdpa_kernel(SDPBackend.MATH):  # the fused one has no second derivative on a CPU
        assert torch.autograd.gradcheck(call, tuple(tensors.values()), fast_mode=True)
        assert torch.autograd.gradgradcheck(call, tuple(tensors.values()), fast_mode=True)
