"""The dispatcher ops, which anybody can call: arguments that do not fit one another are refused by name before anything
reads memory by them, by the backward too, whose saved tensors and weights may have become others since the forward."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from test_registration import backward_arguments, dispatcher_inputs, forward
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import crossvit_kernels
from available import NATIVE
from crossvit_kernels.dispatch.register import OPS
from inputs import DIFFERENTIABLE, EXAMPLES, arrange
from numerics import DEVICES, place

CHECKED = [kernels for kernels in ("reference", "triton") if kernels == "reference" or kernels in NATIVE]
# What any size of is right: of these the others have to be as large.
FREE = {"x", "images", "qkv", "patches", "cls"}


def wider(t: Tensor) -> Tensor:
    return torch.cat([t, t], dim=-1)


def narrower(t: Tensor) -> Tensor:
    return t[..., :1]


def longer(t: Tensor) -> Tensor:
    return torch.cat([t, t], dim=0)


def deeper(t: Tensor) -> Tensor:
    return t[None]


def scalar(t: Tensor) -> Tensor:
    return t.reshape(-1)[0]


def double(t: Tensor) -> Tensor:
    return t.double()


def integer(t: Tensor) -> Tensor:
    return t.int()


def elsewhere(t: Tensor) -> Tensor:
    return t.to("meta")


CHANGES = (wider, narrower, longer, deeper, scalar, double, integer, elsewhere)
REFUSED = r"^[\w' ]+: expected .*, got "


def changed(values: list[Any], i: int, change: Any) -> list[Any]:
    return [*values[:i], change(values[i]), *values[i + 1 :]]


def alike(op: str, name: str, change: Any, before: Tensor) -> bool:
    """Whether the changed argument fits the others all the same."""
    if op == "self_attention":
        return change in (wider, longer, double)  # of six equal parts three are made, of two images four
    if op == "bicubic_resize":
        return change in (wider, narrower, longer, double)
    if op == "layer_norm_linear" and name == "x":
        return change in (longer, deeper)
    after = change(before)
    same = (after.shape, after.dtype, after.device) == (before.shape, before.dtype, before.device)
    return same or (name == "images" and change in (wider, narrower, longer))  # of another size, or more of them


@pytest.mark.parametrize("kernels", CHECKED)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_forward_refuses_what_does_not_fit(name: str, change: Any, kernels: str) -> None:
    op, values = OPS[name], dispatcher_inputs(name, device=DEVICES.get(kernels, "cpu"))
    for i in op.tensors:
        if alike(name, op.inputs[i], change, values[i]):
            continue
        if change is elsewhere and i == op.compute:
            continue  # whose device the others are held to
        with pytest.raises((ValueError, TypeError), match=REFUSED) as raised:
            op.op(*changed(values, i, change), True, kernels)
        assert op.inputs[i] in str(raised.value) or op.inputs[i] in {*FREE, "weight", "w1", op.inputs[op.compute]}


@pytest.mark.parametrize("kernels", CHECKED)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_backward_refuses_what_does_not_fit(name: str, change: Any, kernels: str) -> None:
    """Inputs, out's gradient and what the forward saved."""
    op, values = OPS[name], dispatcher_inputs(name, device=DEVICES.get(kernels, "cpu"))
    outs = forward(op, values, kernels)
    needs = [True] * sum(i in op.tensors for i in op.kept)
    arguments = backward_arguments(op, values, outs, torch.ones_like(outs[0]), needs)
    names = [a.name for a in op.backward_op._schema.arguments]
    for i, argument in enumerate(arguments):
        if not isinstance(argument, Tensor):
            continue
        if change in (double, wider, longer, narrower) and name == "bicubic_resize" and names[i] == "images":
            continue  # what it makes of the gradient is as large
        if change is elsewhere and names[i] == op.inputs[op.compute]:
            continue
        if names[i] == "qkv" and change in (wider, longer):
            refused = r"^(grad_out|out|lse): expected shape .*, got "
        elif names[i] == "images" and change in (wider, narrower, longer):
            if change is not longer:
                continue
            refused = r"^grad_out: expected shape .*, got "
        else:
            refused = REFUSED
        if change is narrower and argument.shape[-1:] == (1,):
            continue
        if argument.numel() == 0 and change in (longer, narrower) and change(argument).shape == argument.shape:
            continue
        with pytest.raises((ValueError, TypeError), match=refused):
            op.backward_op(*changed(arguments, i, change), kernels)


@pytest.mark.parametrize("kernels", CHECKED)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_backward_refuses_needs_that_do_not_fit(name: str, kernels: str) -> None:
    op, values = OPS[name], dispatcher_inputs(name, device=DEVICES.get(kernels, "cpu"))
    outs = forward(op, values, kernels)
    count = sum(i in op.tensors for i in op.kept)
    for needs in ([True] * (count - 1), [True] * (count + 1)):
        arguments = backward_arguments(op, values, outs, torch.ones_like(outs[0]), needs)
        with pytest.raises(ValueError, match=rf"^needs: expected one for each of {count} tensors, got {len(needs)}"):
            op.backward_op(*arguments, kernels)
    optional = [i for i in op.kept if i in op.tensors and op.inputs[i].endswith(("bias", "b1", "scale"))]
    for i in optional[:1]:
        values[i] = None
        if op.inputs[i] == "scale":
            values[op.inputs.index("per_sample")] = False
        outs = forward(op, values, kernels)
        arguments = backward_arguments(op, values, outs, torch.ones_like(outs[0]), [True] * count)
        with pytest.raises(ValueError, match=rf"^needs: expected False for {op.inputs[i]}, which is None, got True"):
            op.backward_op(*arguments, kernels)


@pytest.mark.parametrize("kernels", CHECKED)
@pytest.mark.parametrize(
    "name, number, wrong",
    [
        *(
            (name, "num_heads", n)
            for name in ("self_attention", "cls_cross_attention", "cls_fusion")
            for n in (0, -2, 3)
        ),
        *(("patch_embed", side, n) for side in ("height", "width") for n in (0, -4, 6, 16)),
        *(("bicubic_resize", side, n) for side in ("height", "width") for n in (0, -4)),
        ("linear_residual", "per_sample", True),
        ("layer_norm_mlp", "per_sample", False),
    ],
)
def test_numbers_that_do_not_fit(name: str, number: str, wrong: Any, kernels: str) -> None:
    op, values = OPS[name], dispatcher_inputs(name, device=DEVICES.get(kernels, "cpu"))
    values[op.inputs.index(number)] = wrong
    with pytest.raises(ValueError, match=REFUSED):
        op.op(*values, True, kernels)


@pytest.mark.parametrize("columns", [8, 4096])
def test_weights_replaced_between_forward_and_backward(backend: str, columns: int) -> None:
    """By `.data`, which no version counter sees."""
    for name, weight in (
        ("layer_norm_linear", "weight"),
        ("linear_residual", "weight"),
        ("layer_norm_mlp", "w1"),
        ("layer_norm_mlp", "w2"),
        ("cls_cross_attention", "k_weight"),
        ("patch_embed", "weight"),
    ):
        given = place(EXAMPLES[name](), backend)
        given = {n: v.requires_grad_() if isinstance(v, Tensor) else v for n, v in given.items()}
        out = getattr(crossvit_kernels, name)(**given, kernels=backend)
        given[weight].data = given[weight].data.new_ones((*given[weight].shape[:-1], columns))
        with pytest.raises((RuntimeError, ValueError), match=r"shape|size|expected"):
            out.sum().backward()


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("fake", [False, True])
def test_shapes_alone_are_looked_at_too(name: str, fake: bool) -> None:
    """On the meta device and where a program is traced, whatever backend it is for."""
    op, values = OPS[name], dispatcher_inputs(name)
    shape = forward(op, values, "reference")[0].shape
    with FakeTensorMode() if fake else nullcontext():
        device = "cpu" if fake else "meta"
        values = [torch.empty(v.shape, device=device) if isinstance(v, Tensor) else v for v in values]
        result = op.op(*values, True, "cuda")
        assert (result[0] if op.saved else result).shape == shape
        for i in op.tensors:
            for change in (deeper, scalar, integer, wider):
                if alike(name, op.inputs[i], change, values[i]):
                    continue
                with pytest.raises((ValueError, TypeError), match=REFUSED):
                    op.op(*changed(values, i, change), True, "cuda")


@pytest.mark.parametrize("kernels", ["auto", "reference", *NATIVE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", EXAMPLES)
def test_public_ops_on_the_meta_device(name: str, dtype: torch.dtype, kernels: str) -> None:
    """Shapes and dtypes of the result and of every gradient, whatever backend is asked for."""
    real = {n: v.to(dtype) if isinstance(v, Tensor) else v for n, v in EXAMPLES[name]().items()}
    expected = getattr(crossvit_kernels, name)(**real, kernels="reference")
    given = {
        n: v.to("meta").requires_grad_(name in DIFFERENTIABLE) if isinstance(v, Tensor) else v for n, v in real.items()
    }
    out = getattr(crossvit_kernels, name)(**given, kernels=kernels)
    assert (out.device.type, out.shape, out.dtype) == ("meta", expected.shape, expected.dtype)
    if name in DIFFERENTIABLE:
        leaves = [v for v in given.values() if isinstance(v, Tensor)]
        for leaf, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves)):
            assert (gradient.device.type, gradient.shape, gradient.dtype) == ("meta", leaf.shape, leaf.dtype)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_saved_tensors_that_lie_otherwise(backend: str, name: str) -> None:
    """As views of larger memory they mean the same."""
    op, values = OPS[name], dispatcher_inputs(name, device=DEVICES[backend])
    outs = forward(op, values, backend)
    needs = [True] * sum(i in op.tensors for i in op.kept)
    strided = tuple(arrange(t, "every other element") if t.numel() else t for t in outs)
    results = (
        op.backward_op(*backward_arguments(op, values, saved, torch.ones_like(outs[0]), needs), backend)
        for saved in (outs, strided)
    )
    for dense, other in zip(*results):
        assert torch.equal(dense, other)


@pytest.mark.parametrize("kernels", ["reference", *NATIVE])
@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_saved_beside_16_bit_matrices(name: str, kernels: str) -> None:
    """Below autocast float32 activations meet them: every backend, and the fake, saves the same dtypes."""
    dtype = torch.float16 if kernels == "triton" and DEVICES[kernels] == "cpu" else torch.bfloat16
    op, values = OPS[name], dispatcher_inputs(name, device=DEVICES.get(kernels, "cpu"))
    values = [v.to(dtype) if i in op.matrices and isinstance(v, Tensor) else v for i, v in enumerate(values)]
    found = forward(op, values, kernels)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(v) if isinstance(v, Tensor) else v for v in values]
        expected = forward(op, fakes, kernels)
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in expected]


class Call(nn.Module):
    """A call of an op with one of its arguments for the module's."""

    def __init__(self, op: Any, given: dict[str, Any], name: str) -> None:
        super().__init__()
        self.op, self.given, self.name = op, given, name

    def forward(self, x: Tensor) -> Tensor:
        return self.op(**(self.given | {self.name: x}))


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_proxy_of_torch_fx_is_told_what_to_do(name: str) -> None:
    given = EXAMPLES[name]()
    for tensor in [n for n, v in given.items() if isinstance(v, Tensor)]:
        with pytest.raises(TypeError, match=r"^\w+: expected a tensor .*, got Proxy; .* torch\.fx\.wrap"):
            torch.fx.symbolic_trace(Call(getattr(crossvit_kernels, name), given, tensor))
