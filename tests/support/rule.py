"""What the tests of the rule for when to fuse share: every kind of module that fuses beside its plain PyTorch twin.

A site is such a module. Its parts are what fuses together: where one is disturbed, that part has to give the twin's
very bits, and the others may stay fused.
"""

import copy
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent, LayerNorm
from timm.models.cait import LayerScaleBlock, LayerScaleBlockClassAttn
from timm.models.crossvit import CrossAttentionBlock as TimmCrossAttentionBlock
from timm.models.crossvit import MultiScaleBlock
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crossvit.models.fusion import FUSIONS
from crossvit_kernels import accelerate
from crossvit_kernels.nn import Attention, AttentionBlock, Block, CrossAttentionBlock, LayerNormLinear
from weights import CPU_BACKENDS, perturb

NORM = partial(nn.LayerNorm, eps=1e-6)


def in_turn(**cases: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrises a test over all combinations of the cases, and `kernels`, which takes turns over them: the rule is
    the same for every backend, and each case meets each in some combination."""
    combinations = []
    for turn in itertools.product(*(enumerate(values) for values in cases.values())):
        backend = CPU_BACKENDS[sum(index for index, _ in turn) % len(CPU_BACKENDS)]
        combinations.append((*(value for _, value in turn), backend))
    return pytest.mark.parametrize(",".join((*cases, "kernels")), combinations)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class PlainAttentionBlock(nn.Module):
    """The first half of timm's block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = NORM(48)
        self.attn = TimmAttention(48, 3, qkv_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm1(x))


class PlainCrossAttention(nn.Module):
    """Attention of the first token over all, (B, 1 + N, D) -> (B, 1, D), with PyTorch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Linear(48, 48) for _ in range(3))
        self.proj = nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (3, 16)).transpose(1, 2) for y in (self.wq(x[:, :1]), self.wk(x), self.wv(x)))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PlainCrossAttentionBlock(nn.Module):
    """norm1 and attn under the names of `crossvit_kernels.nn.CrossAttentionBlock`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = NORM(48)
        self.attn = PlainCrossAttention()

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] + self.attn(self.norm1(x))


def plain_stage() -> nn.Module:
    return MultiScaleBlock(
        (32, 48), (4, 5), (1, 1, 0), (2, 3), (2.0, 2.0), qkv_bias=True, drop_path=[0.0], norm_layer=NORM
    )


def our_stage(kernels: str) -> nn.Module:
    return FUSIONS["cross_attention"]((32, 48), ((2, 2), (1, 5)), (1, 1, 0), (2, 3), (2.0, 2.0), [0.0], kernels=kernels)


def stage_inputs() -> tuple[list[Tensor]]:
    return ([tokens(2, 5, 32), tokens(2, 6, 48, seed=1)],)


@dataclass(frozen=True)
class Site:
    """A module that fuses.

    plain: makes the twin; ours: makes the module of this package, by the backend, or None where it is the accelerated
    twin; parts: patterns of the children's names, one per part that fuses by itself; alone: those parts without which
    no op runs; keeps: the ops that run even where every child is called, as they stand for none; exact: whether the
    children are called in the order and with the functions that the twin has, so that the bits are the same.
    """

    plain: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    parts: tuple[str, ...]
    linears: tuple[str, ...]
    norms: tuple[str, ...]
    others: tuple[str, ...] = ()
    ours: Callable[[str], nn.Module] | None = None
    exact: bool = True
    alone: tuple[str, ...] = ()
    keeps: frozenset[str] = frozenset()

    def same_bits(self, kernels: str) -> bool:
        """Whether the module gives the twin's bits where every child is called."""
        return self.exact and (kernels == "reference" or not self.keeps)

    def children(self) -> tuple[str, ...]:
        return self.linears + self.norms + self.others

    def some(self, names: tuple[str, ...], turn: int) -> list[str]:
        """Of two parts one of `names` each; all take turns."""
        parts = [[name for name in names if self.part(name) == part] for part in self.parts]
        taken = [part[turn % len(part)] for part in parts if part]
        return [taken[i % len(taken)] for i in range(2 * turn, 2 * turn + min(2, len(taken)))]

    def pair(
        self, kernels: str, change: Callable[[nn.Module], Any] = lambda module: None, *, before: bool = False
    ) -> tuple[nn.Module, nn.Module]:
        """The module and its twin, with the same weights and both changed; `before` it is accelerated, else when it was
        called and has remembered all that it remembers of calls."""
        twin = perturb(self.plain()).eval()
        ours = self.twin_of(twin, kernels, before)
        for _ in range(0 if before else 2):
            with torch.no_grad():
                ours(*self.inputs())
        for module in (ours, twin):
            seed()
            change(module)
        if before and self.ours is None:
            accelerate(ours, kernels, verbose=False)
        return ours, twin

    def twin_of(self, twin: nn.Module, kernels: str, plain: bool) -> nn.Module:
        if self.ours is None:
            ours = copy.deepcopy(twin)
            return ours if plain else accelerate(ours, kernels, verbose=False)
        ours = self.ours(kernels).eval()
        ours.load_state_dict(twin.state_dict())
        return ours

    def part(self, child: str) -> str:
        """The pattern of the part that `child` is in."""
        return next(part for part in self.parts if re.match(part, child))

    def elsewhere(self, child: str) -> str:
        """The pattern of the children that are in other parts than `child`."""
        return "|".join(part for part in self.parts if part != self.part(child)) or "(?!)"


BLOCK = dict(
    parts=("norm1|attn|ls1|drop_path1", "norm2|mlp|ls2|drop_path2"),
    linears=("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    norms=("norm1", "norm2"),
)
DIRECTIONS = dict(
    parts=(
        *(rf"{name}\.{branch}" for name in ("projs", "fusion", "revert_projs") for branch in range(2)),
        *(rf"blocks\.{branch}\.0\.({half})" for half in ("norm1|attn", "norm2|mlp") for branch in range(2)),
    ),
    linears=("projs.0.2", "fusion.1.attn.wk", "revert_projs.1.2", "blocks.0.0.mlp.fc1"),
    norms=("projs.1.0", "fusion.0.norm1", "revert_projs.0.0", "blocks.0.0.norm1"),
    others=("projs.0.1", "revert_projs.1.1", "fusion.1.attn", "blocks.0.0.attn"),
    inputs=stage_inputs,
)
CROSS = dict(
    inputs=lambda: (tokens(3, 9, 48),),
    parts=("",),
    linears=("attn.wq", "attn.wk", "attn.wv", "attn.proj"),
    norms=("norm1",),
)
SITES = {
    "nn.LayerNormLinear": Site(
        lambda: nn.Sequential(NORM(48), nn.GELU(), nn.Linear(48, 20), nn.GELU()),
        lambda: (tokens(3, 7, 48),),
        ("",),
        ("2",),
        ("0",),
        ("1", "3"),
        lambda kernels: LayerNormLinear(48, 20, pre_activation="gelu", activation="gelu", kernels=kernels),
    ),
    "nn.Attention": Site(
        lambda: TimmAttention(48, 3, qkv_bias=True),
        lambda: (tokens(2, 9, 48),),
        ("",),
        ("qkv", "proj"),
        (),
        ours=lambda kernels: Attention(48, 3, True, kernels=kernels),
        keeps=frozenset({"self_attention"}),
    ),
    "nn.AttentionBlock": Site(
        PlainAttentionBlock,
        lambda: (tokens(2, 9, 48),),
        ("",),
        ("attn.qkv", "attn.proj"),
        ("norm1",),
        ("attn",),
        lambda kernels: AttentionBlock(48, 3, True, kernels=kernels),
        keeps=frozenset({"self_attention"}),
    ),
    "nn.Block": Site(
        lambda: TimmBlock(48, 3, qkv_bias=True, init_values=0.5, norm_layer=NORM),
        lambda: (tokens(2, 9, 48),),
        **BLOCK,
        others=("attn", "mlp", "ls1", "ls2"),
        ours=lambda kernels: Block(48, 3, qkv_bias=True, init_values=0.5, kernels=kernels),
        keeps=frozenset({"self_attention"}),
    ),
    "nn.CrossAttentionBlock": Site(
        PlainCrossAttentionBlock,
        **CROSS,
        others=("attn",),
        ours=lambda kernels: CrossAttentionBlock(48, 3, qkv_bias=True, kernels=kernels),
    ),
    # Of PyTorch's attention where timm multiplies out: the last bits differ.
    "crossvit stage": Site(plain_stage, **DIRECTIONS, ours=our_stage, exact=False, keeps=frozenset({"self_attention"})),
    "timm Block": Site(
        lambda: TimmBlock(48, 3, qkv_bias=True, init_values=0.5),
        lambda: (tokens(2, 9, 48),),
        **BLOCK,
        others=("attn", "attn.q_norm", "attn.attn_drop", "mlp", "mlp.act", "mlp.drop1", "ls1", "ls2", "drop_path2"),
    ),
    "CaiT LayerScaleBlock": Site(
        lambda: LayerScaleBlock(48, 3, qkv_bias=True),
        lambda: (tokens(2, 9, 48),),
        ("norm1|attn", "norm2|mlp"),
        ("mlp.fc1", "mlp.fc2"),
        ("norm2",),
        ("mlp", "mlp.act"),
        alone=("norm2|mlp",),
    ),
    "CaiT LayerScaleBlockClassAttn": Site(
        lambda: LayerScaleBlockClassAttn(48, 3, qkv_bias=True),
        lambda: (tokens(2, 9, 48), tokens(2, 1, 48, seed=1)),
        ("norm1|attn", "norm2|mlp"),
        ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2"),
        ("norm1", "norm2"),
        ("attn", "attn.attn_drop", "mlp", "mlp.act"),
    ),
    "SigLIP AttentionPoolLatent": Site(
        lambda: AttentionPoolLatent(48, num_heads=3, norm_layer=LayerNorm),
        lambda: (tokens(2, 9, 48),),
        ("q|kv", "norm|mlp", "proj"),
        ("q", "kv", "proj", "mlp.fc1", "mlp.fc2"),
        ("norm",),
        ("q_norm", "proj_drop", "mlp", "mlp.act"),
        alone=("q|kv", "norm|mlp"),
    ),
    "timm CrossAttentionBlock": Site(
        lambda: TimmCrossAttentionBlock(48, 3, qkv_bias=True, norm_layer=NORM),
        **CROSS,
        others=("attn", "attn.attn_drop", "drop_path"),
    ),
    "timm MultiScaleBlock": Site(plain_stage, **DIRECTIONS),
}


def at(path: str, change: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    """A change of the child at `path`."""
    return lambda module: change(module.get_submodule(path))


def leaves(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, child) for name, child in module.named_modules() if name and not child._modules)


def watch(module: nn.Module, pattern: str) -> None:
    """A hook that changes nothing on every leaf whose name matches: enough to keep what it is in from fusing."""
    for name, child in leaves(module):
        if re.match(pattern, name):
            child.register_forward_hook(lambda module, inputs, output: None)


class Recorder(TorchDispatchMode):
    """Collects the names of this package's ops that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("crossvit_kernels"):
            self.ops.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def ops_of(module: nn.Module, inputs: tuple[Any, ...]) -> set[str]:
    """The fused ops that a forward runs."""
    with torch.no_grad(), Recorder() as recorder:
        module(*inputs)
    return set(recorder.ops)


def seed() -> None:
    """Seeds the CPU alone: `torch.manual_seed` keeps three tracebacks for devices that are not there, which takes
    longer than a small module's forward."""
    torch.default_generator.manual_seed(0)


def outcome(module: nn.Module, inputs: tuple[Any, ...], gradients: bool = True) -> dict[str, Tensor]:
    """The outputs of a call, and the gradients of its inputs and of all parameters of a fixed loss."""
    inputs = copy.deepcopy(inputs)
    given = {f"input {i}": x for i, x in enumerate(tree_leaves(inputs)) if isinstance(x, Tensor)}
    seed()
    if not gradients:
        with torch.no_grad():
            return {f"output {i}": y for i, y in enumerate(tree_leaves(module(*inputs)))}
    for x in given.values():
        x.requires_grad_()
    module.zero_grad()
    outputs = tree_leaves(module(*inputs))
    sum((y * torch.linspace(-1, 1, y.numel()).to(y).view_as(y)).sum() for y in outputs).backward()
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    results |= {name: x.grad for name, x in (given | dict(module.named_parameters())).items() if x.grad is not None}
    module.zero_grad()
    return results


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Up to roundings: a gradient that is zero by mathematics is held to the largest one's scale."""
    assert found.keys() == expected.keys()
    largest = max((v.abs().max().item() for name, v in expected.items() if not name.startswith("output")), default=0)
    for name, value in expected.items():
        scale = max(value.abs().max().item(), 0 if name.startswith("output") else largest)
        assert (found[name] - value).abs().max().item() <= tolerance * scale, name
