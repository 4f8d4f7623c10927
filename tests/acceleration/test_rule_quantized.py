"""The rule for when to fuse, as to quantised models: torchao's tensors, quantised Linears of PyTorch's, and those that
rehearse quantisation in training give what they give in plain PyTorch modules."""

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_rule_children import put
from torch import nn

import crossvit_kernels
from rule import SITES, assert_close, assert_same_bits, at, in_turn, ops_of, outcome, watch
from timm_models import build, images
from weights import CPU_BACKENDS, our_model, relative, timm_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


def torchao_weights(path: str) -> Callable[[nn.Module], Any]:
    """int8 weights in a tensor subclass; the module stays an nn.Linear."""
    quantization = pytest.importorskip("torchao.quantization")
    return lambda module: quantization.quantize_(
        module, quantization.Int8WeightOnlyConfig(), filter_fn=lambda child, name: name == path
    )


def dynamic(path: str) -> Callable[[nn.Module], Any]:
    """Linears that quantise their inputs, by PyTorch's own means."""
    configuration = torch.ao.quantization.default_dynamic_qconfig
    return lambda module: torch.ao.quantization.quantize_dynamic(module, {path: configuration}, inplace=True)


def rehearsed(path: str) -> Callable[[nn.Module], Any]:
    """torch.ao.nn.qat.Linear, a subclass of nn.Linear that rounds its weight as int8 would."""

    def change(module: nn.Module) -> None:
        child = module.get_submodule(path)
        child.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
        put(module, path, torch.ao.nn.qat.Linear.from_float(child).train(child.training))

    return change


KINDS = {"torchao": torchao_weights, "dynamic": dynamic, "rehearsed": rehearsed}


@in_turn(kind=KINDS, site=SITES)
def test_a_quantised_linear(site: str, kind: str, kernels: str) -> None:
    """One Linear of each part: to the bit where nothing fuses, and the other parts fuse on."""
    where, inputs, gradients = SITES[site], SITES[site].inputs(), kind == "rehearsed"
    for child in where.some(where.linears, list(KINDS).index(kind)):
        for before in (True, False) if where.ours is None else (False,):
            ours, twin = where.pair(kernels, KINDS[kind](child), before=before)
            # A rounding before it may move a value to the next of 256 steps.
            assert_close(outcome(ours, inputs, gradients), outcome(twin, inputs, gradients), 0.02)
            if kernels != "reference":
                untouched = where.pair(kernels)[0]
                watch(untouched, re.escape(child))
                assert ops_of(ours, inputs) == ops_of(untouched, inputs)
        ours, twin = where.pair(kernels, KINDS[kind](child))
        for module in (ours, twin):
            watch(module, where.elsewhere(child))
        if where.same_bits(kernels):
            assert_same_bits(outcome(ours, inputs, gradients), outcome(twin, inputs, gradients))


@in_turn(before=[True, False], name=["deit_tiny_patch16_224", "siglip", "cait_xxs24_224", "crossvit_9_240"])
def test_torchao_over_a_whole_model(name: str, before: bool, kernels: str) -> None:
    """`quantize_(model, Int8WeightOnlyConfig())`, before accelerate and after."""
    quantization = pytest.importorskip("torchao.quantization")
    model, plain = build(name), build(name)
    x = images(model)
    if not before:
        crossvit_kernels.accelerate(model, kernels, verbose=False)(x)
    for m in (model, plain):
        quantization.quantize_(m, quantization.Int8WeightOnlyConfig())
    if before:
        crossvit_kernels.accelerate(model, kernels, verbose=False)
    with torch.no_grad():
        assert relative(model(x), plain(x)) < 1e-4


@pytest.mark.parametrize("kernels", CPU_BACKENDS)
def test_torchao_over_our_models(kernels: str) -> None:
    """Against timm's model with the same weights, quantised too; what is no Linear still runs on the ops."""
    quantization = pytest.importorskip("torchao.quantization")
    for name in ("crossvit_tiny_240", "crossvit_9_dagger_240"):
        plain = timm_model(name, depth=((1, 1, 0),), num_classes=7)
        model = our_model(name, plain, depth=((1, 1, 0),), num_classes=7, kernels=kernels)
        for m in (model, plain):
            quantization.quantize_(m, quantization.Int8WeightOnlyConfig())
        x = torch.randn(2, 3, 240, 240, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert relative(model(x), plain(x)) < 1e-4


@pytest.mark.parametrize("kernels", CPU_BACKENDS)
def test_quantised_in_training(kernels: str) -> None:
    """torch.ao's own preparation of a whole module, which swaps every Linear, and a step of training with it."""
    where = SITES["timm Block"]
    for key in ("nn.Block", "timm Block"):
        ours, twin = SITES[key].pair(kernels)
        found = []
        for module in (ours, twin):
            module.train()
            module.qconfig = torch.ao.quantization.QConfig(
                activation=nn.Identity, weight=torch.ao.quantization.default_weight_fake_quant
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                prepared = torch.ao.quantization.prepare_qat(copy.deepcopy(module))
            kinds = {type(child) for child in prepared.modules()}
            assert torch.ao.nn.qat.Linear in kinds
            found.append(outcome(prepared, where.inputs()))
        assert_close(*found, 0.02)


@pytest.mark.parametrize("kernels", CPU_BACKENDS)
def test_one_weight_in_another_memory_format(kernels: str) -> None:
    """A weight that is no plain tensor of numbers (here sparse) is its Linear's own business."""
    for key in ("nn.LayerNormLinear", "timm Block", "nn.Block"):
        where = SITES[key]
        child = where.linears[0]
        change = at(
            child, lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight.detach().relu().to_sparse()))
        )
        ours, twin = where.pair(kernels, change)
        inputs = where.inputs()
        try:
            expected = outcome(twin, inputs, gradients=False)
        except (RuntimeError, NotImplementedError) as error:
            with pytest.raises(type(error)):
                ours(*inputs)
        else:
            assert_close(outcome(ours, inputs, gradients=False), expected)
