"""What timm holds every model of its own to, of symbolic tracing: forward and backward of the graph, its parts by name,
and the graph scripted; of ours and of accelerated models."""

from typing import Any

import pytest
import torch
from test_timm_suite import CLASSES, MODELS, every, inputs
from timm.models import get_notrace_functions, get_notrace_modules
from timm.models._features_fx import FeatureGraphNet
from torch import nn
from torchvision.models.feature_extraction import NodePathTracer, create_feature_extractor, get_graph_node_names

from weights import relative

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def graph_of(model: nn.Module, train: bool = False) -> nn.Module:
    """A graph that returns what the model does, in both modes, as timm makes it."""
    options: dict[str, Any] = dict(
        leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True
    )
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=options)
    returned = [train_nodes[-1]]
    if train:
        nodes = list(reversed(NodePathTracer(**options).trace(model).nodes))
        names = [node.name for node in nodes]
        returned = [train_nodes[-names.index(node.name)] for node in nodes[0].all_input_nodes]
    return create_feature_extractor(
        model, train_return_nodes=returned, eval_return_nodes=eval_nodes[-1:], tracer_kwargs=options
    )


@every
def test_forward(name: str) -> None:
    """The graph's output is the model's, up to the roundings of its ops."""
    model = MODELS[name]().eval()
    x = inputs(model)
    with torch.inference_mode():
        expected = model(x)
        (found,) = graph_of(model)(x).values()
    assert relative(found, expected) < 1e-5


@every
def test_backward(name: str) -> None:
    """In training every parameter gets a gradient through the graph."""
    graph = graph_of(MODELS[name]().train(), train=True).train()
    x = inputs(MODELS[name]())
    (out,) = graph(x).values()
    assert out.shape == (2, CLASSES)
    out.square().mean().backward()
    for key, parameter in graph.named_parameters():
        assert parameter.grad is not None, key
    assert sum(p.numel() for p in graph.parameters()) == sum(p.numel() for p in MODELS[name]().parameters())


@every
def test_scripted(name: str) -> None:
    """A graph holds no more Python than TorchScript knows."""
    model = MODELS[name]().eval()
    x = inputs(model)
    with torch.inference_mode():
        scripted = torch.jit.script(graph_of(model).eval())
        (found,) = scripted(x).values()
        assert relative(found, model(x)) < 1e-5


@pytest.mark.parametrize("name", ["timm ViT", "timm SigLIP", "timm CaiT", "our ViT", "our ViT, dagger"])
def test_features_by_the_models_own_description(name: str) -> None:
    """timm's FeatureGraphNet: the tokens behind the blocks that `feature_info` names."""
    model = MODELS[name]().eval()
    x = inputs(model)
    seen = []
    for k in (0, 1):
        model.blocks[k].register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.inference_mode():
        model(x)
        for k in (0, 1):
            model.blocks[k]._forward_hooks.clear()
        found = FeatureGraphNet(model, (0, 1))(x)
    for a, b in zip(found, seen, strict=True):
        assert relative(a, b) < 1e-5
