"""The rule for when to fuse, as to weights that something computes: pruning, weight and spectral norms, and other
parametrisations get the bits, the gradients and the second step that plain PyTorch modules give."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from rule import SITES, assert_close, assert_same_bits, at, in_turn, ops_of, outcome, watch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning"),
]


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.1 * weight.flip(0)


def reseeded(child: nn.Module) -> None:
    """A weight of its own for each, as a hypernetwork gives it, before every call."""
    plain = child.weight
    del child._parameters["weight"]
    child.register_parameter("weight_before", plain)
    child.register_forward_pre_hook(lambda module, inputs: setattr(module, "weight", 2 * module.weight_before))
    child.weight = 2 * plain.detach()


LINEAR: dict[str, Callable[[nn.Module], Any]] = {
    "l1 pruning": lambda child: prune.l1_unstructured(child, "weight", 0.5),
    "structured pruning": lambda child: prune.ln_structured(child, "weight", 0.25, n=2, dim=0),
    "bias pruning": lambda child: prune.random_unstructured(child, "bias", 0.5),
    "weight norm by hooks": lambda child: nn.utils.weight_norm(child),
    "spectral norm by hooks": lambda child: nn.utils.spectral_norm(child),
    "weight norm": lambda child: parametrizations.weight_norm(child),
    "spectral norm": lambda child: parametrizations.spectral_norm(child),
    "a parametrisation": lambda child: parametrize.register_parametrization(child, "weight", Symmetric()),
    "one of the bias": lambda child: parametrize.register_parametrization(child, "bias", Symmetric()),
    "a weight set before each call": reseeded,
}
NORM = ("bias pruning", "a parametrisation", "a weight set before each call")


def step(module: nn.Module, inputs: Any) -> None:
    """One of SGD, behind a forward and a backward."""
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    first = module(*inputs)
    sum((y.square().mean() for y in (first if isinstance(first, list) else [first])), torch.zeros(())).backward()
    optimizer.step()
    optimizer.zero_grad()


@in_turn(kind=LINEAR, site=SITES)
def test_computed_weights(site: str, kind: str, kernels: str) -> None:
    """What is computed is computed anew for every call, so that a second step works and starts from the first's
    weights; and exactly where nothing else of the module fuses."""
    where, inputs = SITES[site], SITES[site].inputs()
    turn = list(LINEAR).index(kind)
    for child in where.some(where.linears, turn) + (where.some(where.norms, turn) if kind in NORM else []):
        change = at(child, LINEAR[kind])
        for before in (True, False) if where.ours is None else (False,):
            pair = where.pair(kernels, change, before=before)
            for _ in range(2):
                found, expected = (outcome(module, inputs) for module in pair)
                assert_close(found, expected, 1e-4)  # a norm is taken out of the gradient: it cancels
                for module in pair:
                    step(module, inputs)
        pair = where.pair(kernels, change)
        for module in pair:
            watch(module, where.elsewhere(child))
        found, expected = (outcome(module, inputs) for module in pair)
        if where.same_bits(kernels):
            assert_same_bits(found, expected)


@in_turn(kind=["l1 pruning", "weight norm by hooks", "weight norm", "a parametrisation"], site=SITES)
def test_weights_that_are_plain_again_fuse_again(site: str, kind: str, kernels: str) -> None:
    """What was computed is made the parameter: `prune.remove`, `remove_weight_norm`, `remove_parametrizations`."""
    where = SITES[site]
    ours, untouched = where.pair(kernels)[0], where.pair(kernels)[0]
    for child in map(ours.get_submodule, where.linears):
        LINEAR[kind](child)
        if kind == "l1 pruning":
            prune.remove(child, "weight")
        elif kind == "weight norm by hooks":
            nn.utils.remove_weight_norm(child)
        else:
            parametrize.remove_parametrizations(child, "weight")
    inputs = where.inputs()
    assert ops_of(ours, inputs) == ops_of(untouched, inputs)
    outcome(ours, inputs)
