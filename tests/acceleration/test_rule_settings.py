"""The rule for when to fuse, as to settings: what a module is told after it was made, or accelerated, holds for its
next call, in whichever way that is computed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rule import SITES, assert_close, at, in_turn, ops_of, outcome


def eps(value: float) -> Callable[[nn.Module], Any]:
    return lambda norm: setattr(norm, "eps", value)


@in_turn(gradients=[True, False], site=SITES)
def test_every_norm_has_its_own_eps(gradients: bool, site: str, kernels: str) -> None:
    """Large enough to be seen, and another one for each norm: none is taken for another's."""
    where, inputs = SITES[site], SITES[site].inputs()
    norms = sorted(name for name, module in where.plain().named_modules() if isinstance(module, nn.LayerNorm))

    def change(module: nn.Module) -> None:
        for i, name in enumerate(norms):
            at(name, eps(0.1 + 0.7 * i))(module)

    for before in (True, False) if where.ours is None else (False,):
        ours, twin = where.pair(kernels, change, before=before)
        expected = outcome(twin, inputs, gradients)
        assert_close(outcome(ours, inputs, gradients), expected)
        untouched = outcome(where.pair(kernels)[1], inputs, gradients)
        assert not norms or not torch.allclose(untouched["output 0"], expected["output 0"], rtol=0.01, atol=0.01)
        assert kernels == "reference" or ops_of(ours, inputs), "another eps does not keep it from fusing"


SETTINGS: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "scale of an attention": ("timm Block", lambda m: setattr(m.attn, "scale", 0.03)),
    "scale of an attention without SDPA": (
        "timm Block",
        lambda m: (setattr(m.attn, "scale", 0.03), setattr(m.attn, "fused_attn", False)),
    ),
    "scale of class attention": ("CaiT LayerScaleBlockClassAttn", lambda m: setattr(m.attn, "scale", 0.03)),
    "scale of cross-attention": ("timm CrossAttentionBlock", lambda m: setattr(m.attn, "scale", 0.03)),
    "scale of pooling": (
        "SigLIP AttentionPoolLatent",
        lambda m: (setattr(m, "scale", 0.03), setattr(m, "fused_attn", False)),
    ),
    "pooling by the mean": ("SigLIP AttentionPoolLatent", lambda m: setattr(m, "pool", "avg")),
    "heads of a block": ("nn.Block", lambda m: setattr(m.attn, "num_heads", 3)),
    "GELU by tanh": ("timm Block", lambda m: setattr(m.mlp.act, "approximate", "tanh")),
    "GELU by tanh in CaiT": ("CaiT LayerScaleBlock", lambda m: setattr(m.mlp.act, "approximate", "tanh")),
    "GELU by tanh in a projection": ("nn.LayerNormLinear", lambda m: setattr(m[1], "approximate", "tanh")),
    "GELU by tanh in a stage": ("timm MultiScaleBlock", lambda m: setattr(m.projs[0][1], "approximate", "tanh")),
    "another activation": ("timm Block", lambda m: setattr(m.mlp, "act", nn.ReLU())),
    "another activation in a projection": ("nn.LayerNormLinear", lambda m: m.__setitem__(1, nn.ReLU())),
    "a norm without weights": ("timm Block", lambda m: setattr(m, "norm1", nn.LayerNorm(48, elementwise_affine=False))),
    "a norm without weights of ours": (
        "nn.Block",
        lambda m: setattr(m, "norm1", nn.LayerNorm(48, elementwise_affine=False)),
    ),
    "a norm without bias": ("nn.CrossAttentionBlock", lambda m: setattr(m, "norm1", nn.LayerNorm(48, bias=False))),
    "a norm of another kind": ("nn.AttentionBlock", lambda m: setattr(m, "norm1", nn.RMSNorm(48))),
    "a Linear without bias": ("nn.Block", lambda m: setattr(m.mlp, "fc2", seeded(192, 48, bias=False))),
    "a wider MLP": (
        "timm Block",
        lambda m: (setattr(m.mlp, "fc1", seeded(48, 99)), setattr(m.mlp, "fc2", seeded(99, 48))),
    ),
    "one step more in a projection": ("nn.LayerNormLinear", lambda m: m.append(nn.Softsign())),
    "one step more in a stage": ("timm MultiScaleBlock", lambda m: m.revert_projs[1].append(nn.Softsign())),
    "one step more in a stage of ours": ("crossvit stage", lambda m: m.revert_projs[1].append(nn.Softsign())),
}


def seeded(*sizes: int, **options: Any) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(*sizes, **options)


@in_turn(before=[True, False], setting=SETTINGS)
def test_a_setting_that_was_changed_holds(before: bool, setting: str, kernels: str) -> None:
    """With gradients and without, before accelerate and after a first call."""
    site, change = SETTINGS[setting]
    where, inputs = SITES[site], SITES[site].inputs()
    if where.ours is not None and before:
        pytest.skip("it is not accelerated")
    ours, twin = where.pair(kernels, before=before)
    if not before:
        outcome(ours, inputs)
        outcome(ours, inputs, gradients=False)
    ours, twin = where.pair(kernels, change, before=True) if before else (ours, twin)
    if not before:
        for module in (ours, twin):
            change(module)
    for gradients in (True, False):
        assert_close(outcome(ours, inputs, gradients), outcome(twin, inputs, gradients))
