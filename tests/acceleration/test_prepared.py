"""A fused inference call that is made again gives what the usual way gives, whatever has changed since.

That every change of a child is seen is what test_rule_* say, whose modules have been called before they are changed.
"""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crossvit.models.fusion import FUSIONS
from crossvit_kernels import accelerate, restore
from crossvit_kernels.nn import Block, PatchEmbed
from crossvit_kernels.prepared import Prepared
from crossvit_kernels.watch import forget
from rule import SITES, assert_same_bits, outcome
from weights import CPU_BACKENDS, perturb

pytestmark = [
    pytest.mark.skipif("cpu" not in CPU_BACKENDS, reason="there are no C++ kernels"),
    pytest.mark.several_threads,
]
PREPARED = ("nn.Block", "timm Block", "crossvit stage", "timm MultiScaleBlock")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the ops that prepared calls have given."""
    names: list[str] = []
    call = Prepared.__call__

    def noted(self: Prepared, *inputs: Tensor) -> Any:
        result = call(self, *inputs)
        if result is not None:
            names.append(self.name)
        return result

    monkeypatch.setattr(Prepared, "__call__", noted)
    return names


class Embedding(nn.Module):
    """A PatchEmbed with its CLS token and positions."""

    def __init__(self, kernels: str = "auto") -> None:
        super().__init__()
        self.embed = PatchEmbed((16, 24), 8, embed_dim=12, kernels=kernels)
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 12)), nn.Parameter(torch.zeros(1, 7, 12))

    def forward(self, images: Tensor) -> Tensor:
        return self.embed(images, self.cls_token, self.pos_embed)


def made(site: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """A module that was called twice, and its inputs."""
    if site == "embedding":
        module, inputs = perturb(Embedding()).eval(), (torch.randn(2, 3, 20, 20, generator=torch.Generator()),)
        for _ in range(2):
            outcome(module, inputs, gradients=False)
        return module, inputs
    return SITES[site].pair("auto")[0], SITES[site].inputs()


def fresh(module: nn.Module) -> nn.Module:
    """A copy, which remembers nothing."""
    return copy.deepcopy(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("site", [*PREPARED, "embedding"])
def test_a_call_that_is_made_again_has_the_same_bits(site: str, dtype: torch.dtype, served: list[str]) -> None:
    module, inputs = made(site)
    module, inputs = module.to(dtype), copy.deepcopy(inputs)
    inputs = torch.utils._pytree.tree_map(lambda t: t.to(dtype), inputs)
    served.clear()
    expected = outcome(fresh(module), inputs, gradients=False)
    assert not served
    for _ in range(2):
        assert_same_bits(outcome(module, inputs, gradients=False), expected)
    assert served


def equal_to_all(linear: nn.Linear) -> nn.Linear:
    """A Linear of another class, whose instances equal everything, and which doubles."""

    class Equal(nn.Linear):
        __hash__ = nn.Module.__hash__

        def __eq__(self, other: object) -> bool:
            return True

        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    other = Equal(linear.in_features, linear.out_features, linear.bias is not None).eval()
    other.load_state_dict(linear.state_dict())
    return other


def outcome_or_error(module: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor] | str:
    """The outputs of a call in inference, or what it raises."""
    try:
        return outcome(module, inputs, gradients=False)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "other weights": lambda module: [nn.init.normal_(p, std=0.3) for p in module.parameters()],
    "other parameters": lambda module: [
        setattr(child, name, nn.Parameter(torch.randn_like(p) * 0.3))
        for child in module.modules()
        for name, p in [*child.named_parameters(recurse=False)]
    ],
    "weights of another dtype": lambda module: module.double(),
    "weights that lie otherwise": lambda module: [
        setattr(p, "data", p.data.t().contiguous().t()) for p in module.parameters() if p.dim() == 2
    ],
    "no bias": lambda module: [
        setattr(child, "bias", None) for child in module.modules() if isinstance(child, nn.Linear | nn.Conv2d)
    ],
    "training": lambda module: module.train(),
    "another eps": lambda module: [setattr(m, "eps", 0.5) for m in module.modules() if isinstance(m, nn.LayerNorm)],
    "one norm's eps": lambda module: [
        setattr(m, "eps", 0.5) for m in [m for m in module.modules() if isinstance(m, nn.LayerNorm)][-1:]
    ],
    "the reference": lambda module: [setattr(m, "kernels", "reference") for m in module.modules()],
    "children made anew": lambda module: [
        m.__init__(m.in_features, m.out_features, m.bias is not None) or m.eval()
        for m in module.modules()
        if type(m) is nn.Linear
    ],
    "other dictionaries of parameters": lambda module: [
        m.__dict__.update(_parameters={n: None if p is None else nn.Parameter(3 * p) for n, p in m._parameters.items()})
        for m in module.modules()
        if m._parameters
    ],
    "other dictionaries": lambda module: [
        setattr(m, "__dict__", perturb(copy.deepcopy(m)).__dict__)
        for m in module.modules()
        if isinstance(m, nn.Linear | nn.LayerNorm | nn.Conv2d)
    ],
    "children that say that they are equal": lambda module: [
        setattr(parent, name, equal_to_all(m))
        for parent in [*module.modules()]
        for name, m in [*parent.named_children()]
        if type(m) is nn.Linear
    ],
    "weights in bfloat16": lambda module: module.bfloat16(),
    "norms in bfloat16": lambda module: [m.bfloat16() for m in module.modules() if isinstance(m, nn.LayerNorm)],
    "biases in bfloat16": lambda module: [
        m.__dict__["_parameters"].update(bias=nn.Parameter(m.bias.bfloat16()))
        for m in module.modules()
        if isinstance(m, nn.Linear | nn.Conv2d) and m.bias is not None
    ],
    "keys' biases of another length": lambda module: [
        m.register_parameter("bias", nn.Parameter(torch.zeros(7)))
        for name, m in module.named_modules()
        if name.endswith("wk")
    ],
    "smaller patches": lambda module: [
        setattr(m, "weight", nn.Parameter(m.weight.detach()[..., :4, :4].contiguous()))
        for m in module.modules()
        if isinstance(m, nn.Conv2d)
    ],
    "dropout says that it is at work": lambda module: [
        setattr(m, "drops", lambda: True) for m in module.modules() if hasattr(m, "drops")
    ],
    "a hook": lambda module: [
        m.register_forward_hook(lambda m, i, y: 2 * y) for m in module.modules() if m._parameters
    ],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("site", [*PREPARED, "embedding"])
def test_what_changes_holds_for_the_next_call(site: str, change: str) -> None:
    module, inputs = made(site)
    before = outcome(module, inputs, gradients=False)
    twin = fresh(module)
    for changed in (module, twin):
        torch.manual_seed(0)
        CHANGES[change](changed)
    if change == "weights of another dtype":
        inputs = torch.utils._pytree.tree_map(lambda t: t.double(), inputs)
    for child in twin.modules():
        forget(child)
    expected = outcome_or_error(twin, inputs)
    for _ in range(2):
        found = outcome_or_error(module, inputs)
        if isinstance(expected, str) or isinstance(found, str):
            assert found == expected
        else:
            assert_same_bits(found, expected)
    everywhere = {"other weights", "other parameters", "no bias", "other dictionaries", "a hook"}
    if change in everywhere:
        assert not isinstance(found, str)
        assert not all(torch.equal(value, before[name]) for name, value in found.items())


@pytest.mark.parametrize("site", PREPARED)
def test_what_a_call_depends_on_besides(site: str) -> None:
    """Autocast, gradients, an empty batch, weights that functional_call puts in."""
    module, inputs = made(site)
    twin = fresh(module)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(outcome(module, inputs, gradients=False), outcome(twin, inputs, gradients=False))
    assert_same_bits(outcome(module, inputs), outcome(fresh(module), inputs))
    empty = torch.utils._pytree.tree_map(lambda t: t[:0], inputs)
    assert_same_bits(outcome(module, empty, gradients=False), outcome(fresh(module), empty, gradients=False))
    others = {name: torch.randn_like(p) * 0.3 for name, p in module.named_parameters()}
    with torch.no_grad():
        found, expected = (
            torch.func.functional_call(m, others, copy.deepcopy(inputs)) for m in (module, fresh(module))
        )
    for one, other in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("site", [*PREPARED, "embedding"])
def test_a_model_that_is_dropped_frees_its_memory_at_once(site: str) -> None:
    """What is remembered of a module does not keep it alive, nor what was there before it was changed."""
    module, inputs = made(site)
    weight = weakref.ref(next(module.parameters()))
    gc.collect()
    gc.disable()
    try:
        del module
        assert weight() is None
    finally:
        gc.enable()
    block, inputs = made("nn.Block")
    weight = weakref.ref(block.mlp.fc1.weight)
    block.mlp = nn.Sequential(nn.Linear(48, 48)).eval()
    for _ in range(2):
        outcome(block, inputs, gradients=False)
    gc.collect()
    assert weight() is None


def test_a_stage_writes_into_nothing_that_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a class's forward was replaced, its result may be somebody's."""
    stage, (tokens,) = made("crossvit stage")
    kept = copy.deepcopy(tokens)
    monkeypatch.setattr(Block, "forward", lambda self, x: x)
    with torch.no_grad():
        stage(tokens)
    assert all(map(torch.equal, tokens, kept))
    monkeypatch.undo()
    outputs: list[Tensor] = []
    forward = nn.Sequential.forward

    def recorded(self: nn.Sequential, x: Tensor) -> Tensor:
        outputs.append(forward(self, x))
        outputs.append(outputs[-1].clone())
        return outputs[-2]

    monkeypatch.setattr(nn.Sequential, "forward", recorded)
    with torch.no_grad():
        stage(tokens)
    assert outputs
    assert all(map(torch.equal, outputs[::2], outputs[1::2]))


def test_children_that_share_a_parameter_are_each_read() -> None:
    """Once one of them has another, the other's is not read in its place."""
    module, x = Block(12, 2).eval(), torch.randn(1, 3, 12)
    module.norm2.weight = module.norm1.weight
    with torch.no_grad():
        for norm in (module.norm2, module.norm1):
            for _ in range(2):
                assert torch.equal(module(x), fresh(module)(x))
            norm.weight = nn.Parameter(torch.randn(12))
        for _ in range(2):
            assert torch.equal(module(x), fresh(module)(x))


def test_wrong_inputs_are_refused_in_the_usual_words() -> None:
    module = Block(12, 2).eval()
    with torch.no_grad():
        for _ in range(2):
            module(torch.ones(1, 3, 12))
        for wrong in (torch.ones(1, 3, 10), torch.ones(1, 3, 12, dtype=torch.int64)):
            with pytest.raises((TypeError, ValueError, RuntimeError)) as first:
                fresh(module)(wrong)
            with pytest.raises(first.type) as again:
                module(wrong)
            assert str(again.value) == str(first.value)


def test_a_restored_module_is_plain(served: list[str]) -> None:
    module, inputs = made("timm Block")
    restore(module)
    served.clear()
    outcome(module, inputs, gradients=False)
    assert not served
    accelerate(module, verbose=False)
    expected = outcome(module, inputs, gradients=False)
    assert_same_bits(outcome(module, inputs, gradients=False), expected)


@pytest.mark.parametrize("name", FUSIONS)
def test_every_fusion_of_branches_is_repeatable(name: str) -> None:
    """A stage may write into what its own blocks have made, and into nothing else."""
    torch.manual_seed(0)
    stage = FUSIONS[name]((32, 48), ((2, 2), (2, 2)), (1, 1, 0), (2, 3), (2.0, 2.0), [0.0]).eval()
    tokens = [torch.randn(2, 5, 32), torch.randn(2, 5, 48)]
    kept = copy.deepcopy(tokens)
    with torch.no_grad():
        first, second = ([t.clone() for t in stage([*tokens])] for _ in range(2))
        assert all(map(torch.equal, first, second))
        assert all(map(torch.equal, tokens, kept))
