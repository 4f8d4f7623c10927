"""The rule for when to fuse, as to tracers: torch.fx and timm's feature extractors see the graph that they see of
timm's own models, torch.jit.trace records the ops' plain selves, and torch.jit.script says what to do first."""

import inspect
import warnings
from typing import Any

import pytest
import torch
from timm.models._features import FeatureGetterNet
from timm.models._features_fx import FeatureGraphNet, GraphExtractNet, create_feature_extractor, get_graph_node_names
from torch import Tensor, fx, nn

import crossvit
from crossvit_kernels import accelerate, restore
from rule import SITES, assert_close, assert_same_bits, in_turn, outcome
from timm_models import build, images
from weights import CPU_BACKENDS, relative, timm_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]
MODELS = ["deit_tiny_patch16_224", "siglip", "cait_xxs24_224", "crossvit_9_240", "crossvit_9_dagger_240"]


def structure(graph: fx.Graph) -> list[tuple[str, str, tuple[str, ...]]]:
    """What each node does to which others."""
    return [
        (n.op, getattr(n.target, "__name__", str(n.target)), tuple(map(str, n.all_input_nodes))) for n in graph.nodes
    ]


class OfTwo(nn.Module):
    """A stage as a module of two tensors: a list is no input for a graph."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, first: Tensor, second: Tensor) -> Any:
        return self.stage([first, second])


def traced(module: nn.Module, inputs: tuple[Any, ...]) -> fx.GraphModule:
    """Symbolically; what a call may leave out is left out."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    return fx.symbolic_trace(module, concrete_args={p.name: p.default for p in parameters[len(inputs) :]})


@in_turn(site=SITES)
def test_symbolic_trace_of_a_module(site: str, kernels: str) -> None:
    """It computes what the plain module does, to the bit, its children are in it, and where it is accelerated the graph
    is the plain module's."""
    where = SITES[site]
    ours, twin = where.pair(kernels)
    inputs = where.inputs()
    if isinstance(inputs[0], list):
        ours, twin, inputs = OfTwo(ours), OfTwo(twin), tuple(inputs[0])
    found, plain = (traced(module, inputs) for module in (ours, twin))
    if where.ours is None:
        assert structure(found.graph) == structure(plain.graph)
    called, expected_calls = (
        {node.target.removeprefix("stage.") for node in graph.graph.nodes if node.op == "call_module"}
        for graph in (found, plain)
    )
    for child in (*where.linears, *where.norms):
        assert child in called or child not in expected_calls  # timm's own LayerNorm is traced through
    expected = outcome(twin, inputs)
    if where.exact:
        assert_same_bits(outcome(found, inputs), expected)
    assert_close(outcome(found, inputs), expected)


@in_turn(name=MODELS)
def test_features_of_accelerated_models(name: str, kernels: str) -> None:
    """The same nodes under the same names, and the same bits from each of those taken."""
    plain, model = build(name), accelerate(build(name), kernels, verbose=False)
    x = images(plain)
    names = get_graph_node_names(plain)
    assert get_graph_node_names(model) == names
    chosen = names[1][:: max(1, len(names[1]) // 12)]
    chosen = [node for node in chosen if not node.endswith(("getattr", "getitem")) and "get" not in node] + names[1][
        -1:
    ]
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            expected, found = (create_feature_extractor(m, chosen)(x) for m in (plain, model))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert not isinstance(value, Tensor) or torch.equal(found[key], value), key
    with torch.no_grad():
        assert relative(found[names[1][-1]], model(x)) < 1e-5


@in_turn(name=MODELS)
def test_timms_wrappers_around_accelerated_models(name: str, kernels: str) -> None:
    """GraphExtractNet by node names, FeatureGraphNet and FeatureGetterNet by the model's own description."""
    plain, model = build(name), accelerate(build(name), kernels, verbose=False)
    x = images(plain)
    nodes = ["norm.0", "norm.1"] if name.startswith("crossvit") else ["blocks.1.mlp.fc1", "norm"]
    with torch.no_grad():
        expected, found = (GraphExtractNet(m, nodes)(x) for m in (plain, model))
        assert all(map(torch.equal, found, expected))
        if hasattr(plain, "feature_info"):
            expected, found = (FeatureGraphNet(m, (0, 1))(x) for m in (plain, model))
            assert all(map(torch.equal, found, expected))
        if hasattr(plain, "forward_intermediates"):
            expected, found = (FeatureGetterNet(m, (0, 1))(x) for m in (plain, model))
            assert all(relative(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


OURS: dict[str, dict[str, Any]] = {
    "crossvit_tiny_240": {"depth": ((1, 1, 0), (1, 2, 0))},
    "crossvit_9_dagger_240": {"depth": ((1, 1, 0),)},
    "deit_tiny_patch16_224": {"depth": 2},
    **{
        f"crossvit_tiny_240 {fusion}": {"depth": ((1, 1, 0),), "fusion": fusion}
        for fusion in ("none", "all_attention", "class_token", "pairwise")
    },
    "crossvit_tiny_240 averaged and cropped": {"depth": ((1, 1, 2),), "global_pool": "avg", "crop_scale": True},
}


def ours(name: str, kernels: str, **options: Any) -> crossvit.CrossViT:
    torch.manual_seed(0)
    return crossvit.create_model(name.split()[0], num_classes=7, kernels=kernels, **(OURS[name] | options)).eval()


@in_turn(name=OURS)
def test_our_models_are_traced(name: str, kernels: str) -> None:
    """Symbolically; the graph holds no op of this package, and gives the logits and gradients of plain PyTorch, whose
    resizing is less exact than the op's: a stem's ReLUs turn that into more than roundings."""
    model, plain = ours(name, kernels), ours(name, "reference")
    x = torch.randn(2, 3, *model.image_size, generator=torch.Generator().manual_seed(0))
    traced = fx.symbolic_trace(model)
    assert not [n for n in traced.graph.nodes if "crossvit_kernels::" in str(n.target)]
    for m in (plain, traced):
        m.zero_grad()
        m(x).square().sum().backward()
        with torch.no_grad():
            logits = m(x)
        if m is plain:
            expected = logits, {n: p.grad for n, p in m.named_parameters()}
    assert relative(logits, expected[0]) < 1e-5
    found = {n: p.grad for n, p in traced.named_parameters()}
    largest = max(g.abs().max() for g in expected[1].values() if g is not None)
    for key, value in expected[1].items():
        if value is not None:
            assert (found[key] - value).abs().max() <= 1e-4 * max(value.abs().max(), 1e-2 * largest), key


@in_turn(name=OURS)
def test_features_of_our_models(name: str, kernels: str) -> None:
    """By timm's create_feature_extractor: children have their names in the graph, and give what they give in plain
    PyTorch."""
    model, plain = ours(name, kernels), ours(name, "reference")
    x = torch.randn(2, 3, *model.image_size, generator=torch.Generator().manual_seed(0))
    train, evaluation = get_graph_node_names(model)
    inner = "blocks.1" if name.startswith("deit") else "blocks.0.blocks.1.0"
    nodes = [f"{inner}.norm1", f"{inner}.attn.qkv", f"{inner}.mlp.fc2", evaluation[-1]]
    assert set(nodes) <= set(evaluation)
    with torch.no_grad():
        found = create_feature_extractor(model, nodes)(x)
        seen: dict[str, Tensor] = {}
        for node in nodes[:3]:
            plain.get_submodule(node).register_forward_hook(lambda m, i, y, node=node: seen.setdefault(node, y))
        logits = plain(x)
    assert relative(found[nodes[-1]], logits) < 1e-5
    for node, value in seen.items():
        assert relative(found[node], value) < 1e-5, node
    assert len(train) >= len(nodes)


@pytest.mark.parametrize("kernels", CPU_BACKENDS)
def test_a_traced_model_of_ours_equals_timms(kernels: str) -> None:
    """The graphs of both, with the same weights."""
    plain = timm_model("crossvit_tiny_240", depth=((1, 1, 0),), num_classes=7)
    model = crossvit.create_model("crossvit_tiny_240", depth=((1, 1, 0),), num_classes=7, kernels=kernels).eval()
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 240, 240, generator=torch.Generator().manual_seed(0))
    node = "norm.1"
    with torch.no_grad():
        expected, found = (create_feature_extractor(m, [node])(x)[node] for m in (plain, model))
    assert relative(found[:, :1] if found.dim() == 3 else found[:, None], expected[:, :1]) < 1e-5


@in_turn(name=MODELS)
def test_torch_jit_trace(name: str, kernels: str) -> None:
    """A recorded model gives the logits of the accelerated one, and for another batch those too."""
    model = accelerate(build(name), kernels, verbose=False)
    x, more = images(model), images(model, 3)
    with torch.no_grad():
        traced = torch.jit.trace(model, (x,))
        for given in (x, more):
            assert relative(traced(given), model(given)) < 1e-5


@in_turn(name=MODELS)
def test_torch_jit_script_says_to_restore_first(name: str, kernels: str) -> None:
    model = accelerate(build(name), kernels, verbose=False)
    x = images(model)
    with pytest.raises(RuntimeError, match=r"restore\("):
        torch.jit.script(model)
    restore(model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        assert relative(torch.jit.script(model)(x), model(x)) < 1e-5


@pytest.mark.parametrize("kernels", CPU_BACKENDS)
def test_torch_jit_script_of_our_models_says_what_to_do(kernels: str) -> None:
    """In a sentence of its own, not in a compiler's message."""
    for name in ("crossvit_tiny_240", "deit_tiny_patch16_224"):
        with pytest.raises(RuntimeError, match=r"torch\.(export|jit\.trace|fx)"):
            torch.jit.script(ours(name, kernels))


@in_turn(name=MODELS[:4])
def test_a_traced_accelerated_model_scripts(name: str, kernels: str) -> None:
    """As timm's users do: symbolically traced first, then scripted."""
    model = accelerate(build(name), kernels, verbose=False)
    x = images(model)
    nodes = get_graph_node_names(model)[1][-1:]
    scripted = torch.jit.script(create_feature_extractor(model, nodes).eval())
    with torch.no_grad():
        assert relative(scripted(x)[nodes[0]], model(x)) < 1e-5
