"""What timm holds every model of its own to, held of ours and of accelerated ones: forward, backward, description,
features, heads, files, and construction without memory."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet, FeatureInfo
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

import crossvit
from crossvit_kernels import accelerate
from timm_models import build, images
from weights import perturb, relative

CLASSES = 10


def accelerated(name: str) -> Callable[..., nn.Module]:
    return lambda **options: accelerate(build(name, **options), verbose=False)


def ours(name: str, **arguments: Any) -> Callable[..., nn.Module]:
    def create(**options: Any) -> nn.Module:
        with torch.device("meta"):
            model = crossvit.create_model(name, **({"num_classes": CLASSES} | arguments | options))
        return perturb(model.to_empty(device="cpu")).eval()

    return create


DEIT = dict(depth=3, embed_dim=48, num_heads=3, image_size=64)
SMALL = dict(embed_dim=(32, 48), num_heads=(2, 3), image_size=96)
MODELS: dict[str, Callable[..., nn.Module]] = {
    "timm ViT": accelerated("deit_tiny_patch16_224"),
    "timm SigLIP": accelerated("siglip"),
    "timm CaiT": accelerated("cait_xxs24_224"),
    "timm CrossViT": accelerated("crossvit_9_240"),
    "timm CrossViT, dagger": accelerated("crossvit_9_dagger_240"),
    "our CrossViT": ours("crossvit_tiny_240", depth=((1, 1, 0), (1, 2, 0), (0, 1, 2)), **SMALL),
    "our CrossViT, dagger": ours("crossvit_9_dagger_240", depth=((1, 1, 0), (1, 2, 0)), **SMALL),
    "our CrossViT, averaged": ours("crossvit_tiny_240", depth=((1, 1, 0),) * 3, global_pool="avg", **SMALL),
    "our CrossViT, pairwise": ours("crossvit_tiny_240", depth=((1, 1, 0),) * 3, fusion="pairwise", **SMALL),
    "our ViT": ours("deit_tiny_patch16_224", **DEIT),
    "our ViT, dagger": ours("deit_tiny_patch16_224", **DEIT, multi_conv=True),
}
WITH_FEATURES = [name for name in MODELS if "timm CrossViT" not in name]  # timm's has no features
OURS = [name for name in MODELS if name.startswith("our")]
every = pytest.mark.parametrize("name", MODELS)
featured = pytest.mark.parametrize("name", WITH_FEATURES)


def inputs(model: nn.Module, batch: int = 2) -> Tensor:
    if hasattr(model, "image_size"):
        return torch.rand(batch, 3, *model.image_size, generator=torch.Generator().manual_seed(1)) - 0.5
    return images(model, batch)


@every
def test_forward(name: str) -> None:
    """No NaN, and with gradient checkpointing, where there is any, the same."""
    model = MODELS[name]()
    x = inputs(model)
    expected = model(x)
    assert expected.shape == (2, CLASSES)
    assert expected.isfinite().all()
    try:
        model.set_grad_checkpointing()
    except AssertionError as error:  # timm's CrossViT says that it has none
        assert "not supported" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        model.set_grad_checkpointing(False)
    assert torch.equal(model(x), expected)


@every
def test_backward(name: str) -> None:
    """In training every parameter gets a gradient."""
    model = MODELS[name]().train()
    out = model(inputs(model))
    assert out.shape[-1] == CLASSES
    out.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@every
def test_description_and_heads(name: str) -> None:
    """The sizes that the model names are those of its outputs, with its head, without one, and with a new one; what it
    says of itself names what there is."""
    model = MODELS[name]()
    x = inputs(model)
    assert model.num_classes == CLASSES
    assert model.num_features > 0
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.forward_head(features), model(x), rtol=1e-4, atol=1e-5)
    if isinstance(features, Tensor):
        assert features.shape[-1] == model.num_features
    head = model.get_classifier()
    assert any(module is head for module in model.modules())
    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(x), pooled, rtol=1e-4, atol=1e-5)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    empty = MODELS[name](num_classes=0) if name in OURS else None
    assert empty is None or empty(x).shape == pooled.shape


@pytest.mark.parametrize("name", OURS)
def test_default_cfg(name: str) -> None:
    """As timm's models describe themselves; timm prepares images by it, and finds what it names."""
    model = MODELS[name]()
    cfg, state = model.default_cfg, model.state_dict()
    size = (3, *model.image_size)
    assert cfg["input_size"] == size
    assert cfg["num_classes"] == CLASSES
    for names in (cfg["classifier"], cfg["first_conv"]):
        for key in (names,) if isinstance(names, str) else names:
            assert f"{key}.weight" in state
    data = timm.data.resolve_data_config(model=model)
    assert data["input_size"] == size
    transform = timm.data.create_transform(**data)
    assert transform is not None


@pytest.mark.parametrize("name", ["crossvit_15_dagger_240", "crossvit_18_dagger_408", "deit_tiny_patch16_224"])
def test_default_cfg_is_timms(name: str) -> None:
    with torch.device("meta"):
        found, theirs = crossvit.create_model(name).default_cfg, timm.get_pretrained_cfg(name).to_dict()
    assert {key: theirs[key] for key in found} == found


@featured
def test_forward_intermediates(name: str) -> None:
    """As many as `feature_info` describes, of the sizes it says; the last tokens are `forward_features`'."""
    model = MODELS[name]()
    x = inputs(model)
    info = FeatureInfo(copy.deepcopy(model.feature_info), len(model.feature_info))
    last, found = model.forward_intermediates(x)
    check_features(found, info, x)
    for a, b in zip(leaves(last), leaves(model.forward_features(x)), strict=True):
        torch.testing.assert_close(a, b)
    model.set_grad_checkpointing()
    again = model.forward_intermediates(x, intermediates_only=True)
    for a, b in zip(again, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    flat = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    for a, b in zip(flat, found, strict=True):
        torch.testing.assert_close(a, b.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)


def leaves(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def check_features(found: list[Tensor], info: FeatureInfo, x: Tensor) -> None:
    assert len(found) == len(info.channels())
    for channels, reduction, feature in zip(info.channels(), info.reduction(), found):
        assert feature.shape[:2] == (len(x), channels)
        for side, size in zip(feature.shape[2:], x.shape[2:], strict=True):
            assert abs(side - size / reduction) <= 1
        assert feature.isfinite().all()


@featured
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("indices", [2, (0,), (-1, 1), None])
def test_feature_getter(name: str, norm: bool, indices: Any) -> None:
    """timm's wrapper, which prunes what the features do not need: the features of the whole model, and described."""
    model, whole = MODELS[name](), MODELS[name]()
    x = inputs(model)
    chosen = range(len(model.feature_info)) if indices is None else indices
    getter = FeatureGetterNet(model, chosen if isinstance(chosen, int) else tuple(chosen), norm=norm).eval()
    found = getter(x)
    expected = whole.forward_intermediates(x, indices=indices, norm=norm, intermediates_only=True)
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 1e-5
    if indices != (-1, 1):  # timm describes them in the order asked for, and gives them in the model's
        check_features(found, getter.feature_info, x)


@featured
@pytest.mark.parametrize("prune_norm", [True, False])
@pytest.mark.parametrize("prune_head", [True, False])
def test_prune_intermediate_layers(name: str, prune_norm: bool, prune_head: bool) -> None:
    """What is left gives the same features under the indices that come back, and is less."""
    model, whole = MODELS[name](), MODELS[name]()
    x = inputs(model)
    assert model.prune_intermediate_layers([0], prune_norm=prune_norm, prune_head=prune_head) == [0]
    (found,) = model.forward_intermediates(x, indices=[0], intermediates_only=True)
    (expected,) = whole.forward_intermediates(x, indices=[0], intermediates_only=True)
    assert relative(found, expected) < 1e-5
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, whole)]
    assert sizes[0] < sizes[1]
    norms = model.norm if isinstance(model.norm, nn.ModuleList) else [model.norm]
    assert all(isinstance(norm, nn.Identity) == prune_norm for norm in norms)
    assert (model.num_classes == 0) == prune_head
    if name in OURS:
        assert len(model.feature_info) * len(whole.blocks) == len(whole.feature_info)
        assert model(x).shape == (2, model.head_hidden_size if prune_head else CLASSES)
        model.reset_classifier(3)
        assert model(x).shape == (2, 3)


@pytest.mark.parametrize("name", OURS)
def test_prune_intermediate_layers_by_branch(name: str) -> None:
    """The features are counted branch by branch: where stages go, their numbers change, and come back."""
    model, whole = MODELS[name](), MODELS[name]()
    x = inputs(model)
    count, stages = len(model.feature_info), len(model.blocks)
    last = count - stages  # the last branch's first feature
    kept = model.prune_intermediate_layers([last])
    assert kept == [count // stages - 1]
    assert len(model.blocks) == 1
    assert model.feature_info == [{**info, "module": "blocks.0"} for info in whole.feature_info[::stages]]
    (found,) = model.forward_intermediates(x, indices=kept, intermediates_only=True)
    (expected,) = whole.forward_intermediates(x, indices=[last], intermediates_only=True)
    assert relative(found, expected) < 1e-6
    with pytest.raises(ValueError, match=rf"indices must lie between -{count} and {count - 1}"):
        whole.prune_intermediate_layers([count])


@every
def test_on_meta(name: str) -> None:
    """Built and run without memory, and then given some."""
    with torch.device("meta"):
        model = MODELS[name]().to("meta")
    out = model(inputs(model).to("meta"))
    assert (out.device.type, out.shape) == ("meta", (2, CLASSES))
    model.to_empty(device="cpu").load_state_dict(MODELS[name]().state_dict())
    assert torch.equal(model(inputs(model)), MODELS[name]()(inputs(model)))


@every
def test_state_dict(name: str) -> None:
    """Through a file to another model of its kind, in a copy and in a pickle."""
    model, other = MODELS[name](), MODELS[name]()
    x = inputs(model)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@every
def test_groups_for_optimizers(name: str) -> None:
    """timm's layer-wise groups know every parameter, by the model's own matcher; what is exempt from decay is there."""
    model = MODELS[name]()
    names = dict(model.named_parameters())
    exempt = model.no_weight_decay()
    assert exempt & names.keys()
    assert name not in OURS or exempt <= names.keys()
    layers = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert layers.keys() == names.keys()
    assert len(set(layers.values())) > 2
    for groups in (
        param_groups_weight_decay(model, 0.05, no_weight_decay_list=exempt),
        param_groups_layer_decay(model, 0.05, no_weight_decay_list=exempt, layer_decay=0.8),
    ):
        assert sum(len(group["params"]) for group in groups) == len(names)
        assert all(math.isfinite(group["weight_decay"]) for group in groups)
