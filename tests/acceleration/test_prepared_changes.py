"""A fused inference call is kept to be made again only where it stays what it was."""

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import nn

from crossvit_kernels import blocks
from crossvit_kernels.nn import Block, PatchEmbed
from crossvit_kernels.watch import WATCHES
from weights import CPU_BACKENDS

pytestmark = [
    pytest.mark.skipif("cpu" not in CPU_BACKENDS, reason="there are no C++ kernels"),
    pytest.mark.several_threads,
]


def swap_weights(block: Any) -> None:
    block.norm1.weight, block.norm2.weight = block.norm2.weight, block.norm1.weight


DURING_A_CALL: dict[str, Callable[[Any], None]] = {
    "eps": lambda block: setattr(block.norm1, "eps", 3.0),
    "num_heads": lambda block: setattr(block.attn, "num_heads", 2),
    "a bias": lambda block: setattr(block.attn.qkv, "bias", nn.Parameter(torch.randn(24))),
    "an activation": lambda block: setattr(block.mlp, "act", nn.ReLU()),
    "a child": lambda block: setattr(block, "norm1", nn.LayerNorm(8, eps=3.0)),
    "a child that is gone": lambda block: delattr(block, "mlp"),
    "two weights that change places": swap_weights,
}


@pytest.mark.parametrize("change", DURING_A_CALL)
def test_a_call_during_which_the_module_changes_is_not_kept(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may run while C++ does: what was read before is not taken for what is there afterwards."""
    block, x = Block(8, 4).eval(), torch.randn(1, 3, 8)
    nn.init.normal_(block.norm1.weight)
    mlp, run = block.mlp, blocks.native.transformer_block

    def changing(*arguments: Any, **settings: Any) -> Any:
        out = run(*arguments, **settings)
        DURING_A_CALL[change](block)
        return out

    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(blocks.native, "transformer_block", changing)
            block(x)
        block.mlp = getattr(block, "mlp", mlp)
        for _ in range(3):
            assert torch.equal(block(x), copy.deepcopy(block)(x))


def test_a_size_that_is_changed_in_place_is_read_anew() -> None:
    module = PatchEmbed((16, 32), 8, 3, 16).eval()
    module.image_size = cast(Any, [16, 32])
    inputs = torch.randn(2, 3, 20, 24), torch.randn(1, 1, 16), torch.randn(1, 9, 16)
    with torch.no_grad():
        for _ in range(2):
            module(*inputs)
        cast(Any, module.image_size)[:] = 32, 16
        assert torch.equal(module(*inputs), copy.deepcopy(module)(*inputs))


def test_a_module_whose_children_share_a_parameter_is_kept() -> None:
    module, x = Block(12, 2).eval(), torch.randn(1, 3, 12)
    module.norm2.weight = module.norm1.weight
    with torch.no_grad():
        module(x)
    assert module.__dict__[WATCHES].prepared


def test_a_convolution_without_a_bias_is_kept_with_its_weight() -> None:
    """Whose rows are not taken for the arguments."""
    module = PatchEmbed((16, 32), 8, 3, 16, proj=nn.Conv2d(3, 16, 8, 8, bias=False)).eval()
    with torch.no_grad():
        module(torch.randn(2, 3, 20, 24), torch.randn(1, 1, 16), torch.randn(1, 9, 16))
    (kept,) = module.__dict__[WATCHES].prepared.values()
    arguments = [*map(dict.get, kept.homes[:1], kept.keys[:1])]
    assert all(tensor is module.proj.weight for tensor in kept.tensors(arguments))
