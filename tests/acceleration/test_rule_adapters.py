"""The rule for when to fuse, as to adapters: peft's and loralib's give what they give in plain PyTorch modules, while
they are at work, merged, and unloaded."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_rule_children import put
from torch import nn

import crossvit_kernels
from rule import SITES, assert_close, assert_same_bits, in_turn, ops_of, outcome, watch
from timm_models import build, images
from weights import CPU_BACKENDS, our_model, relative, timm_model

peft = pytest.importorskip("peft")
loralib = pytest.importorskip("loralib")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]


def configuration(kind: str, targets: list[str]) -> Any:
    if kind == "IA3":
        feedforward = [target for target in targets if target.endswith("fc2")]
        return peft.IA3Config(target_modules=targets, feedforward_modules=feedforward, init_ia3_weights=False)
    return peft.LoraConfig(r=4, target_modules=targets, use_dora=kind == "DoRA", init_lora_weights=False)


def randomised(module: nn.Module) -> None:
    """Adapters whose weights all matter, the same in both of a pair."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name or "ia3" in name:
                parameter.uniform_(-0.5, 0.5, generator=generator).add_(float("magnitude" in name or "ia3" in name))


def inject(kind: str, path: str, merge: bool = False) -> Callable[[nn.Module], Any]:
    def change(module: nn.Module) -> None:
        peft.inject_adapter_in_model(configuration(kind, [path]), module)
        randomised(module)
        if merge:
            module.get_submodule(path).merge()

    return change


def of_loralib(path: str, merge: bool = False) -> Callable[[nn.Module], Any]:
    """loralib's Linear is a subclass of nn.Linear that adds its update while it trains, and merges it for inference."""

    def change(module: nn.Module) -> None:
        old = module.get_submodule(path)
        new = loralib.Linear(old.in_features, old.out_features, r=4, lora_alpha=8)
        new.load_state_dict(old.state_dict(), strict=False)
        randomised(new)
        new.train(not merge)  # which returns nothing
        put(module, path, new)

    return change


ADAPTERS: dict[str, Callable[[str], Callable[[nn.Module], Any]]] = {
    "LoRA": lambda path: inject("LoRA", path),
    "DoRA": lambda path: inject("DoRA", path),
    "IA3": lambda path: inject("IA3", path),
    "LoRA merged": lambda path: inject("LoRA", path, merge=True),
    "DoRA merged": lambda path: inject("DoRA", path, merge=True),
    "loralib": of_loralib,
    "loralib merged": lambda path: of_loralib(path, merge=True),
}


@in_turn(kind=ADAPTERS, site=SITES)
def test_an_adapter_on_a_linear(site: str, kind: str, kernels: str) -> None:
    """Output and all gradients, its own among them; to the bit where nothing else of the module fuses, and else the
    other parts fuse on."""
    where, inputs = SITES[site], SITES[site].inputs()
    for child in where.some(where.linears, list(ADAPTERS).index(kind)):
        change = ADAPTERS[kind](child)
        for before in (True, False) if where.ours is None else (False,):
            ours, twin = where.pair(kernels, change, before=before)
            assert_close(outcome(ours, inputs), outcome(twin, inputs))
            if kernels != "reference":
                untouched = where.pair(kernels)[0]
                watch(untouched, re.escape(child))
                assert ops_of(ours, inputs) == ops_of(untouched, inputs)
        ours, twin = where.pair(kernels, change)
        for module in (ours, twin):
            watch(module, where.elsewhere(child))
        if where.same_bits(kernels):
            assert_same_bits(outcome(ours, inputs), outcome(twin, inputs))


TARGETS = {
    "deit_tiny_patch16_224": ["qkv", "fc2"],
    "siglip": ["qkv", "kv", "fc1"],
    "cait_xxs24_224": ["q", "v", "fc2"],
    "crossvit_9_240": ["qkv", "wq", "wv"],
}


@in_turn(before=[True, False], kind=["LoRA", "DoRA", "IA3"], name=TARGETS)
def test_peft_over_a_whole_model(name: str, kind: str, before: bool, kernels: str) -> None:
    """`get_peft_model` and a step of training, then `merge_and_unload`: the logits of timm's model all along, and in
    the end all modules fuse as they did at first."""
    logits: list[list[torch.Tensor]] = []
    for accelerated in (True, False):
        model = build(name)
        x = images(model)
        untouched = crossvit_kernels.accelerate(copy.deepcopy(model), kernels, verbose=False)
        if accelerated and not before:
            crossvit_kernels.accelerate(model, kernels, verbose=False)(x)
        adapted = peft.get_peft_model(model, configuration(kind, TARGETS[name]))
        randomised(adapted)
        if accelerated and before:
            crossvit_kernels.accelerate(adapted, kernels, verbose=False)
        first = adapted(x)
        optimizer = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), 0.01)
        first.square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            second = adapted(x)
            unloaded = adapted.merge_and_unload()
            third = unloaded(x)
        logits.append([first.detach(), second, third])
        if accelerated and kernels != "reference":
            crossvit_kernels.accelerate(unloaded, kernels, verbose=False)
            assert ops_of(unloaded, (x,)) == ops_of(untouched, (x,))
    for found, expected in zip(*logits, strict=True):
        assert relative(found, expected) < 1e-3


@pytest.mark.parametrize("kernels", CPU_BACKENDS)
def test_peft_over_our_models(kernels: str) -> None:
    """LoRA on our model as on timm's."""
    plain = timm_model("crossvit_tiny_240", depth=((1, 1, 0),), num_classes=7)
    model = our_model("crossvit_tiny_240", plain, depth=((1, 1, 0),), num_classes=7, kernels=kernels)
    x = torch.randn(2, 3, 240, 240, generator=torch.Generator().manual_seed(0))
    adapted = []
    for m in (model, plain):
        adapted.append(peft.get_peft_model(m, configuration("LoRA", ["qkv", "wq", "fc1", "projs.0.2"])))
        randomised(adapted[-1])
    assert relative(adapted[0](x), adapted[1](x)) < 1e-4
    for m in adapted:
        m(x).square().mean().backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in adapted]
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[1].items():
        assert relative(gradients[0][name], expected) < 1e-3, name
