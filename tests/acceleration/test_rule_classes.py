"""The rule for when to fuse, as to what is replaced for all modules at once: a forward on a class, before or after
accelerate, and global hooks."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from timm.layers import LayerScale
from timm.models.cait import ClassAttn
from timm.models.crossvit import CrossAttention as TimmCrossAttention
from timm.models.vision_transformer import Attention as TimmAttention
from torch import nn
from torch.nn.modules import module as hooks

import crossvit_kernels.nn
from rule import SITES, assert_close, assert_same_bits, in_turn, ops_of, outcome
from timm_models import build, images

CLASSES = {
    "nn.Linear": nn.Linear,
    "nn.LayerNorm": nn.LayerNorm,
    "nn.GELU": nn.GELU,
    "nn.Dropout": nn.Dropout,
    "nn.Identity": nn.Identity,
    "timm Attention": TimmAttention,
    "timm Mlp": timm.layers.Mlp,
    "timm LayerScale": LayerScale,
    "timm LayerNorm": timm.layers.LayerNorm,
    "timm ClassAttn": ClassAttn,
    "timm CrossAttention": TimmCrossAttention,
}
OURS = ("Attention", "Mlp", "CrossAttention", "LayerScale", "LayerNormLinear", "CrossAttentionBlock")


def twice(run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: 2 * run(*args, **options)


@in_turn(before=[True, False], method=["forward", "_call_impl"], name=CLASSES)
def test_a_method_replaced_on_a_class_is_the_one_that_runs(
    name: str, method: str, before: bool, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = CLASSES[name]
    for key, site in SITES.items():
        if site.ours is not None and not (name in ("nn.Linear", "nn.LayerNorm") or key == "nn.LayerNormLinear"):
            continue  # its own Mlp has no GELU child, and timm's classes are not in it
        ours, twin = site.pair(kernels)
        inputs = site.inputs()
        plain = outcome(twin, inputs)
        if before:
            with monkeypatch.context() as patch:
                patch.setattr(kind, method, twice(getattr(kind, method)))
                ours, twin = site.pair(kernels, before=True)
                compare(ours, twin, inputs, kind, plain, site.same_bits(kernels))
        else:
            assert_close(outcome(ours, inputs), plain)
            with monkeypatch.context() as patch:
                patch.setattr(kind, method, twice(getattr(kind, method)))
                compare(ours, twin, inputs, kind, plain, site.same_bits(kernels))
        assert_close(outcome(ours, inputs), plain)


def compare(ours: nn.Module, twin: nn.Module, inputs: Any, kind: type, plain: Any, exact: bool) -> None:
    expected = outcome(twin, inputs)
    if any(type(m) is kind for m in twin.modules()):
        assert not torch.equal(expected["output 0"], plain["output 0"])
    found = outcome(ours, inputs)
    if exact and kind in (nn.Linear, nn.LayerNorm) and all(any(type(m) is kind for m in p) for p in halves(twin)):
        assert_same_bits(found, expected)
    assert_close(found, expected)


def halves(module: nn.Module) -> list[list[nn.Module]]:
    """The children of a block's two halves, or all in one."""
    named = list(module.named_modules())
    second = [m for name, m in named if name.startswith(("norm2", "mlp", "norm", "mlp"))]
    first = [m for name, m in named if name and m not in second]
    return [half for half in (first, second) if half]


@in_turn(name=OURS)
def test_a_forward_replaced_on_a_class_of_this_package(
    name: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = getattr(crossvit_kernels.nn, name)
    for site in (site for site in SITES.values() if site.ours is not None):
        ours = site.pair(kernels)[0]
        inputs = site.inputs()
        plain = outcome(ours, inputs)
        if not any(type(m) is kind for m in ours.modules()):
            continue
        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", twice(kind.forward))
            changed = outcome(ours, inputs)
        assert not torch.allclose(changed["output 0"], plain["output 0"])
        again = outcome(ours, inputs)
        assert_same_bits(again, plain)


@in_turn(before=[True, False])
def test_attention_maps_are_collected_by_a_forward_on_the_class(
    before: bool, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is widely done to timm's attention to look at its probabilities."""
    maps = []

    def forward(self: Any, x: torch.Tensor, attn_mask: Any = None, is_causal: bool = False) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        probabilities = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)
        maps.append(probabilities.detach())
        return self.proj_drop(self.proj((probabilities @ v).transpose(1, 2).reshape(b, n, c)))

    model = build("deit_tiny_patch16_224")
    x = images(model)
    expected = model(x)
    if not before:
        crossvit_kernels.accelerate(model, kernels, verbose=False)(x)
    monkeypatch.setattr(TimmAttention, "forward", forward)
    if before:
        crossvit_kernels.accelerate(model, kernels, verbose=False)
    found = model(x)
    assert len(maps) == len(model.blocks)
    assert all(torch.allclose(m.sum(-1), torch.ones(())) for m in maps)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


GLOBAL = {
    "forward hook": hooks.register_module_forward_hook,
    "forward pre-hook": hooks.register_module_forward_pre_hook,
    "backward hook": hooks.register_module_full_backward_hook,
    "backward pre-hook": hooks.register_module_full_backward_pre_hook,
}


@pytest.fixture(autouse=True)
def _no_hook_is_left() -> Iterator[None]:
    yield
    assert not hooks._global_forward_hooks
    assert not hooks._global_backward_hooks


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@in_turn(kind=GLOBAL)
def test_a_hook_on_all_modules_sees_every_child(kind: str, kernels: str) -> None:
    """With the same bits; where it is timm's module, in its order."""
    for site in SITES.values():
        ours, twin = site.pair(kernels)
        inputs = site.inputs()
        before = ops_of(ours, inputs)
        names = {id(m): name for module in (ours, twin) for name, m in module.named_modules()}
        runs: list[list[str]] = []
        called: list[str] = []
        handle = GLOBAL[kind](lambda module, *_, called=called, names=names: called.append(names[id(module)]))
        try:
            for module in (ours, twin):
                called.clear()
                results = outcome(module, inputs)
                runs.append([name for name in called if name in site.linears + site.norms])
                if module is ours:
                    found = results
            assert ops_of(ours, inputs) <= site.keeps
        finally:
            handle.remove()
        assert runs[0] == runs[1] if site.exact else sorted(runs[0]) == sorted(runs[1])
        assert runs[0]
        if site.same_bits(kernels):
            assert_same_bits(found, results)
        assert ops_of(ours, inputs) == before
