"""A block in inference is one call into C++: to the bit what its ops come to, and the ops themselves wherever somebody
looks at them or something is wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import crossvit_kernels
from available import NATIVE
from crossvit_kernels import blocks
from crossvit_kernels.nn import Block
from crossvit_kernels.prepared import Prepared

pytestmark = [
    pytest.mark.skipif("cpu" not in NATIVE, reason="the C++ kernels are not there"),
    pytest.mark.several_threads,
]

WIDTH, HEADS = 96, 3


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every block that asks: whether C++ took it; a call that is made again asks only where C++ takes it."""
    asked: list[bool] = []
    original, again = blocks.native.transformer_block, Prepared.__call__

    def spy(*args: Any, **options: Any) -> Tensor | None:
        out = original(*args, **options)
        asked.append(out is not None)
        return out

    def noted(self: Prepared, *inputs: Tensor) -> Any:
        out = again(self, *inputs)
        if out is not None:
            asked.append(True)
        return out

    monkeypatch.setattr(blocks.native, "transformer_block", spy)
    monkeypatch.setattr(Prepared, "__call__", noted)
    return asked


def block(**options: Any) -> Block:
    torch.manual_seed(0)
    made = Block(WIDTH, HEADS, 3.0, **options).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def by_ops(module: nn.Module, x: Tensor) -> Tensor:
    """Where a gradient could be wanted the ops are called one by one."""
    with torch.enable_grad():
        return module(x.requires_grad_(False)).detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{"qkv_bias": True}, {"init_values": 0.3}, {"drop_path": 0.5}], ids=str)
def test_the_bits_are_those_of_the_ops(calls: list[bool], options: dict[str, Any], dtype: torch.dtype) -> None:
    model = block(**options).to(dtype)
    x = torch.randn(3, 21, 2 * WIDTH).to(dtype)
    for tokens in (x[..., :WIDTH], x[..., :WIDTH].transpose(0, 1), x[:1, 1:, :WIDTH].contiguous()):
        with torch.no_grad():
            assert torch.equal(model(tokens), by_ops(model, tokens))
    assert calls == [True] * 3


def test_timms_block_too(calls: list[bool]) -> None:
    model = timm.models.vision_transformer.Block(WIDTH, HEADS, init_values=0.3).eval()
    x = torch.randn(2, 17, WIDTH)
    expected = model(x).detach()
    crossvit_kernels.accelerate(model, "cpu", verbose=False)
    with torch.no_grad():
        out = model(x)
    assert torch.equal(out, by_ops(model, x))
    torch.testing.assert_close(out, expected)
    assert calls == [True]


def _autocast(model: Block, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def _flops(model: Block, x: Tensor) -> Any:
    with FlopCounterMode(display=False) as counter:
        out = model(x)
    (batch, tokens, width), weights = x.shape, sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert counter.get_total_flops() == 2 * batch * tokens * (weights + 2 * tokens * width)
    return out


LOOKED_AT: dict[str, Callable[[Block, Tensor], Any]] = {
    "autocast": _autocast,
    "a counter of operations": _flops,
    "float64": lambda model, x: model.double()(x.double()),
    "vmap": lambda model, x: torch.vmap(model)(x[None]),
    "empty batch": lambda model, x: model(x[:0]),
    "reference": lambda model, x: (setattr(model, "kernels", "reference"), model(x))[1],
    "a quantised child": lambda model, x: (setattr(model.mlp, "fc1", nn.Sequential(model.mlp.fc1)), model(x))[1],
}


@pytest.mark.parametrize("how", LOOKED_AT)
def test_elsewhere_the_ops_are_called(calls: list[bool], how: str) -> None:
    model, x = block(), torch.randn(2, 5, WIDTH)
    expected = by_ops(model, x)
    with torch.no_grad():
        out = LOOKED_AT[how](model, x)
    assert True not in calls
    torch.testing.assert_close(
        out.float().reshape(-1, 5, WIDTH),
        expected[: len(out)] if out.dim() == 3 else expected,
        rtol=0.05,
        atol=0.3 if how == "autocast" else 1e-4,
    )


def test_in_training_it_is_not_asked(calls: list[bool]) -> None:
    model = block(drop_path=0.5).train()
    with torch.no_grad():
        model(torch.randn(2, 5, WIDTH))
    assert calls == []


BREAKS: dict[str, Callable[[Block], Any]] = {
    "weight": lambda b: setattr(b.attn.qkv, "weight", nn.Parameter(torch.ones(3 * WIDTH, WIDTH - 1))),
    "norm_bias": lambda b: setattr(b.norm1, "bias", nn.Parameter(torch.ones(WIDTH + 1))),
    "w2": lambda b: setattr(b.mlp.fc2, "weight", nn.Parameter(torch.ones(WIDTH, WIDTH))),
    "num_heads": lambda b: setattr(b.attn, "num_heads", 5),
    "eps": lambda b: setattr(b.norm2, "eps", -1.0),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_wrong_is_named_as_by_the_ops(calls: list[bool], name: str) -> None:
    model, x = block(), torch.randn(2, 5, WIDTH)
    BREAKS[name](model)
    with torch.no_grad(), pytest.raises((ValueError, TypeError), match=f"^{name}"):
        model(x)
    assert calls == [False]


def test_dtypes_that_no_op_takes_together_are_left_to_plain_pytorch(calls: list[bool]) -> None:
    model, x = block(), torch.randn(2, 5, WIDTH)
    model.mlp.fc1.bias = nn.Parameter(torch.ones(3 * WIDTH, dtype=torch.bfloat16))
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        model(x)
    assert calls == [False]
