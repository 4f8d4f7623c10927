"""One rule for when to fuse: a change after a first call is noticed wherever it hangs, and by the right module."""

import collections
import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from timm.models.crossvit import MultiScaleBlock
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from crossvit.models.cross_attention_fusion import CrossAttentionFusion
from crossvit_kernels import accelerate, restore
from crossvit_kernels.nn import Block, PatchEmbed
from weights import perturb

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


class Tripled(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


class Twice(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def stage() -> MultiScaleBlock:
    return perturb(
        MultiScaleBlock((16, 32), (4, 9), (1, 1, 0), (2, 2), (2.0, 2.0), qkv_bias=True, drop_path=[0.0])
    ).eval()


def steps(*widths: int) -> nn.ModuleList:
    """Projections with another LayerNorm."""
    pairs = [widths, widths[::-1]]
    return perturb(nn.ModuleList(nn.Sequential(Tripled(a), nn.GELU(), nn.Linear(a, b)) for a, b in pairs), seed=3)


def attention_of_fusion(module: nn.Module) -> None:
    module.fusion = copy.deepcopy(module.fusion)
    for layer in module.fusion:
        layer.norm1 = perturb(Tripled(layer.norm1.normalized_shape[0]))


def without_hooks(module: nn.Module) -> None:
    module.mlp.fc1._forward_hooks = collections.OrderedDict()
    module.mlp.fc1.register_forward_hook(lambda m, i, o: o * 2)


def other_dictionary(module: nn.Module) -> None:
    module._modules = dict(module._modules)
    module.norm2 = nn.Identity()


def plain_query_norm(module: nn.Module) -> None:
    del module.attn.q_norm
    module.attn.q_norm = lambda q: q * 3


def no_norm_weight(module: nn.Module) -> None:
    module.norm1.weight = module.norm1.bias = None


def broadcast_bias(module: nn.Module) -> None:
    module.mlp.fc1.bias = nn.Parameter(torch.full((1,), 0.5))


TOKENS = [X, torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(1))]
CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any], Any]] = {
    "projections": (stage, lambda m: setattr(m, "projs", steps(16, 32)), TOKENS),
    "projections back": (stage, lambda m: setattr(m, "revert_projs", steps(32, 16)), TOKENS),
    "fusion": (stage, attention_of_fusion, TOKENS),
    "new hooks": (lambda: perturb(TimmBlock(16, 2)).eval(), without_hooks, X),
    "new dictionary": (lambda: perturb(TimmBlock(16, 2)).eval(), other_dictionary, X),
    "a query norm that is no module": (lambda: perturb(TimmBlock(16, 2)).eval(), plain_query_norm, X),
    "a norm without weight": (lambda: perturb(TimmBlock(16, 2)).eval(), no_norm_weight, X),
    "a bias that broadcasts": (lambda: perturb(TimmBlock(16, 2)).eval(), broadcast_bias, X),
    "one factor for all channels": (
        lambda: perturb(TimmBlock(16, 2, init_values=0.5)).eval(),
        lambda m: setattr(m.ls1, "gamma", nn.Parameter(torch.tensor([0.3]))),
        X,
    ),
    "a query per sample": (
        lambda: perturb(AttentionPoolLatent(16, num_heads=2)).eval(),
        lambda m: setattr(m, "latent", nn.Parameter(torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(5)))),
        X,
    ),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_timms_modules_give_what_they_give_without_us(name: str, gradients: bool) -> None:
    make, change, x = CHANGES[name]
    plain, module = make(), accelerate(make(), verbose=False)
    with torch.set_grad_enabled(gradients):
        module(x)
        for m in (plain, module):
            change(m)
        for found, expected in zip(module(x), plain(x)):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_copy_looks_at_its_own_children() -> None:
    for make in (lambda: accelerate(perturb(TimmBlock(16, 2)).eval(), verbose=False), lambda: perturb(Block(16, 2))):
        block = make().eval()
        with torch.no_grad():
            block(X)
            for copied in (copy.copy(block), block._replicate_for_data_parallel()):
                copied._modules = dict(block._modules)
                copied.mlp = copy.deepcopy(block.mlp)
                copied.mlp.fc1.__class__ = Twice
                expected = copy.deepcopy(copied)
                expected.norm2.register_forward_hook(lambda *_: None)  # the MLP half runs as modules
                torch.testing.assert_close(copied(X), expected(X), rtol=1e-5, atol=1e-5)
                assert not torch.allclose(copied(X), block(X), rtol=1e-2)


def test_a_mode_sees_every_function() -> None:
    class Doubled(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            return out * 2 if func is F.linear else out

    plain = perturb(TimmBlock(16, 2)).eval()
    module = accelerate(copy.deepcopy(plain), verbose=False)
    with torch.no_grad():
        module(X)
        with Doubled():
            torch.testing.assert_close(module(X), plain(X), rtol=1e-5, atol=1e-5)
        with torch.device("cpu"):  # a mode of PyTorch's own, which changes no call
            torch.testing.assert_close(module(X), plain(X), rtol=1e-5, atol=1e-5)


def test_a_convolution_of_its_own() -> None:
    embed = perturb(PatchEmbed((8, 8), 4, 3, 16))
    images, cls, positions = torch.randn(2, 3, 8, 8), torch.zeros(1, 1, 16), torch.zeros(1, 5, 16)
    first = embed(images, cls, positions)
    embed.proj._conv_forward = lambda x, weight, bias: F.conv2d(x, weight * 2, bias * 2, 4)
    torch.testing.assert_close(embed(images, cls, positions), first * 2, rtol=1e-4, atol=1e-4)


def test_a_stage_of_ours_calls_its_branches_and_overwrites_nothing_that_was_seen() -> None:
    fusion = perturb(CrossAttentionFusion([16, 32], [(2, 2), (3, 3)], (1, 1, 1), [2, 2], [2, 2], [0.0])).eval()
    with torch.no_grad():
        expected = fusion([x.clone() for x in TOKENS])
        kept: list[tuple[Tensor, Tensor]] = []
        branches: list[Tensor] = []
        fusion.blocks[0][-1].register_forward_hook(lambda m, i, o: kept.append((o, o.clone())))
        fusion.blocks[1].register_forward_hook(lambda m, i, o: branches.append(o))
        for found, plain in zip(fusion([x.clone() for x in TOKENS]), expected):
            torch.testing.assert_close(found, plain)
        assert torch.equal(*kept[0])
        assert len(branches) == 1
        fusion.blocks[0] = nn.Identity()
        given = [x.clone() for x in TOKENS]
        fusion(given)
        assert all(torch.equal(a, b) for a, b in zip(given, TOKENS))


def test_restore_forgets_our_own_modules_too() -> None:
    block = accelerate(Block(16, 2), verbose=False)
    block(X)
    restore(block)
    assert not any(key.startswith("_crossvit") for m in block.modules() for key in m.__dict__)


def test_the_first_call_of_a_process_may_be_compiled() -> None:
    code = """
import torch
from crossvit_kernels.nn import Block
with torch.no_grad():
    torch.compile(Block(16, 2).eval(), backend="eager", fullgraph=True)(torch.randn(2, 5, 16))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
