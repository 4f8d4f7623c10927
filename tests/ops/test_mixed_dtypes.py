"""Arguments of several dtypes outside autocast: the op takes what plain PyTorch takes, and gives its dtypes."""

import importlib
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import crossvit_kernels
import inputs
import random_calls
from available import NATIVE, computes
from draws import WIDE, Draw
from inputs import DIFFERENTIABLE, EXAMPLES, Random
from numerics import BFLOAT16, DEVICES, FLOAT16, place

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORMED = ("layer_norm_linear", "layer_norm_mlp", "cls_cross_attention", "cls_fusion")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("precision", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("name", WIDE)
def test_float32_beside_16_bits(backend: str, name: str, precision: Any) -> None:
    """LayerNorm's parameters, the residual, the factor, CLS token and positions: each alone and all of them, by the
    rule for equal results, forward and gradients in every argument's own dtype."""
    if not computes(backend, precision):
        pytest.skip(f"{backend} hands {precision} to the reference")
    groups = [*WIDE[name], tuple(n for group in WIDE[name] for n in group)]
    for group in groups[-1:] if backend == "triton" else groups:
        make = lambda number: {  # noqa: E731
            "layer_norm_linear": lambda r: inputs.layer_norm_linear(r, 3, 7, 24, out=40),
            "linear_residual": lambda r: inputs.linear_residual(r, 17, 3, 24, out=40, scale="channel"),
            "layer_norm_mlp": lambda r: inputs.layer_norm_mlp(r, 17, 3, 24, hidden=40, scale="sample"),
            "patch_embed": lambda r: inputs.patch_embed(r, 2, 8, 12, patch=4, embed=24),
            "cls_cross_attention": lambda r: inputs.cls_cross_attention(r, 3, 9, 24, 2),
            "cls_fusion": lambda r: inputs.cls_fusion(r, 3, 9, 20, 24, 2),
        }[name](Random(number))
        draw = Draw(name, backend, "mixed", precision, 1, frozenset(group), make, random.Random(0))
        random_calls.check(draw)


def groups_of(op: str) -> list[tuple[str, ...]]:
    """Each tensor alone, and those that belong together."""
    tensors = [n for n, v in EXAMPLES[op]().items() if isinstance(v, Tensor)]
    norms = [(n, n.replace("weight", "bias")) for n in tensors if n.endswith("norm_weight")]
    others = {
        "cls_fusion": [("cls", "proj_weight", "proj_bias"), ("cls", "proj_norm_bias", "proj_weight", "proj_bias")],
        "cls_cross_attention": [("cls", "norm_weight", "norm_bias"), ("cls", "patches")],
        "patch_embed": [("cls_token", "pos_embed"), ("images", "weight", "bias")],
        "linear_residual": [("residual", "scale"), ("weight", "bias")],
    }
    return [*((n,) for n in tensors), *norms, *others.get(op, [])]


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_plain_pytorch_takes_and_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every argument, and every group that belongs together, in every dtype beside every other: a result in the dtype
    that plain PyTorch gives, or, where that raises, a TypeError that names an argument. What F.linear takes for some
    strides of x only, a bias of another dtype, no op takes."""
    module = importlib.import_module(f"crossvit_kernels.ops.{name}")
    plain = getattr(module, f"{name}_reference")
    for normed in NORMED:
        monkeypatch.setattr(
            importlib.import_module(f"crossvit_kernels.ops.{normed}"),
            "layer_norm",
            lambda x, weight, bias, eps: F.layer_norm(x, weight.shape, weight, bias, eps),
            raising=False,
        )
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight, bias=None: linear(x.contiguous(), weight, bias))
    served = 0
    for others in DTYPES:
        for group in groups_of(name):
            for dtype in DTYPES:
                given = {
                    n: v.to(dtype if n in group else others) if isinstance(v, Tensor) else v
                    for n, v in EXAMPLES[name]().items()
                }
                try:
                    wanted = plain(**given).dtype
                except RuntimeError:
                    wanted = None
                for kernels in ("reference", "auto"):
                    case = f"{group} in {dtype}, others in {others}, {kernels}"
                    if wanted is None:
                        with pytest.raises(TypeError, match=r"^\w+: expected .* got torch\.") as raised:
                            getattr(crossvit_kernels, name)(**given, kernels=kernels)
                        assert raised.value.args[0].partition(":")[0] in given, case
                    else:
                        assert getattr(crossvit_kernels, name)(**given, kernels=kernels).dtype is wanted, case
                        served += dtype is not others
    assert served > 0 or name in ("self_attention", "bicubic_resize")


@pytest.mark.parametrize("kernels", ["reference", *NATIVE])
def test_a_clip_blocks_halves_with_float32_norms(kernels: str) -> None:
    """As the modules compute them: LayerNorm in float32 around float16 or bfloat16 Linears."""
    dtype = torch.float16 if kernels == "triton" and DEVICES["triton"] == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    norm, up, down = nn.LayerNorm(32), nn.Linear(32, 48).to(dtype), nn.Linear(48, 32).to(dtype)
    norm.weight.data.normal_(1, 0.2)
    for module in (norm, up, down):
        module.to(DEVICES.get(kernels, "cpu"))
    x = torch.randn(2, 5, 32).to(DEVICES.get(kernels, "cpu"), dtype).requires_grad_()
    leaves = [x, *norm.parameters(), *up.parameters(), *down.parameters()]
    expected = x + down(F.gelu(up(norm(x))))
    grad_out = torch.randn_like(expected)
    plain = [expected, *torch.autograd.grad(expected, leaves, grad_out)]
    weights = (norm.weight, norm.bias, up.weight, up.bias, down.weight, down.bias)
    out = crossvit_kernels.layer_norm_mlp(x, *weights, norm.eps, kernels=kernels)
    found = [out, *torch.autograd.grad(out, leaves, grad_out)]
    for value, wanted in zip(found, plain):
        assert value.dtype is wanted.dtype
        torch.testing.assert_close(value, wanted, rtol=0, atol=3e-2 * wanted.float().abs().max().item())
    if kernels == "reference" and x.device.type == "cpu":
        assert torch.equal(out, expected)


@pytest.mark.parametrize("name", [n for n in WIDE if n in DIFFERENTIABLE])
def test_compiled(backend: str, name: str) -> None:
    """The fakes know the dtypes of outputs and gradients."""
    torch._dynamo.reset()
    dtype = torch.float16 if backend == "triton" else torch.bfloat16
    wide = {n for group in WIDE[name] for n in group}
    given = place(EXAMPLES[name](), backend)
    given = {n: v.to(torch.float32 if n in wide else dtype) if isinstance(v, Tensor) else v for n, v in given.items()}
    leaves = [v.requires_grad_() for v in given.values() if isinstance(v, Tensor)]
    op = getattr(crossvit_kernels, name)
    compiled = torch.compile(lambda v: op(**v, kernels=backend), fullgraph=True, backend="aot_eager")
    results = (
        [out, *torch.autograd.grad(out.float().square().sum(), leaves)]
        for out in (op(**given, kernels=backend), compiled(given))
    )
    for eager, traced in zip(*results):
        assert traced.dtype is eager.dtype
        torch.testing.assert_close(traced, eager, rtol=1e-2, atol=1e-2 * eager.float().abs().max().item())


def test_an_empty_batch_with_a_factor_in_float32(backend: str) -> None:
    """The stream is then float32 and LayerNorm's parameters are not, of which plain PyTorch knows no such thing."""
    given = place(inputs.layer_norm_mlp(Random(), 0, 5, 16, hidden=24, scale="sample"), backend)
    scale = given.pop("scale")
    given = {n: v.bfloat16().requires_grad_() if isinstance(v, Tensor) else v for n, v in given.items()}
    out = crossvit_kernels.layer_norm_mlp(**given, scale=scale, kernels=backend)
    assert (out.shape, out.dtype) == ((0, 5, 16), torch.float32)
    grads = torch.autograd.grad(out.sum(), [v for v in given.values() if isinstance(v, Tensor)])
    assert all(g.dtype is torch.bfloat16 and not g.any() for g in grads)
