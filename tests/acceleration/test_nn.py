"""The drop-in modules: timm's results from timm's state dicts, and what happens where the fused ops cannot stand in."""

from functools import partial

import pytest
import timm.layers
import torch
from timm.models.crossvit import CrossAttentionBlock as TimmCrossAttentionBlock
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn
from torch.nn.utils import parametrize

from crossvit_kernels.nn import (
    Attention,
    Block,
    CrossAttentionBlock,
    LayerNormLinear,
    Mlp,
    PatchEmbed,
    drop_path_scale,
    set_kernels,
)
from weights import CPU_BACKENDS, perturb, relative

pytestmark = pytest.mark.parametrize("kernels", CPU_BACKENDS)
X = torch.randn(4, 10, 48, generator=torch.Generator().manual_seed(0))


def compare(theirs: nn.Module, ours: nn.Module, x: Tensor = X, tolerance: float = 2e-6) -> None:
    """Same state dict, and from the same seed the same output and gradients, in evaluation and in training."""
    perturb(theirs)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for training in (False, True):
        results = []
        for module in (theirs, ours):
            module.train(training).zero_grad()
            inputs = x.clone().requires_grad_()
            torch.manual_seed(0)
            out = module(inputs)
            (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
            results.append([out, inputs.grad, *(p.grad for p in module.parameters())])
        scale = max(gradient.abs().max() for gradient in results[0][2:])
        for want, found in zip(*results, strict=True):
            # The gradient of the keys' biases is zero, so each is held to the largest gradient's scale too.
            assert (found - want).abs().max() < tolerance * max(want.abs().max(), scale)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_bias": True, "drop_path": 0.5},
        {"init_values": 0.3},
        {"init_values": 0.3, "drop_path": 0.5},
        {"proj_drop": 0.2, "attn_drop": 0.3, "drop_path": 0.2, "init_values": 0.5},
    ],
)
def test_block_is_timms(options: dict[str, float], kernels: str) -> None:
    """A block with any mixture of drop path, LayerScale and dropout."""
    compare(TimmBlock(48, 3, **options), Block(48, 3, kernels=kernels, **options))


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"attn_drop": 0.4, "proj_drop": 0.1}])
def test_attention_is_timms(options: dict[str, float], kernels: str) -> None:
    """Attention by itself."""
    compare(TimmAttention(48, 4, **options), Attention(48, 4, kernels=kernels, **options))


def test_mlp_is_timms(kernels: str) -> None:
    """The MLP by itself, with dropout behind both layers."""
    compare(timm.layers.Mlp(48, 96, drop=0.3), Mlp(48, 96, drop=0.3))


@pytest.mark.parametrize(
    "options", [{}, {"qkv_bias": True, "drop_path": 0.5}, {"attn_drop": 0.4, "proj_drop": 0.1, "drop_path": 0.2}]
)
def test_cross_attention_block_is_timms(options: dict[str, float], kernels: str) -> None:
    """From joined tokens as timm passes them; from CLS and patches apart it is the same."""
    ours = CrossAttentionBlock(48, 3, kernels=kernels, **options)
    compare(TimmCrossAttentionBlock(48, 3, norm_layer=partial(nn.LayerNorm, eps=1e-6), **options), ours)
    ours.eval()
    assert torch.equal(ours(X[:, 0], X[:, 1:]), ours(X)[:, 0])


@pytest.mark.parametrize("pre", [None, "gelu"])
@pytest.mark.parametrize("post", [None, "gelu"])
def test_layer_norm_linear_is_a_sequential(pre: str | None, post: str | None, kernels: str) -> None:
    """It computes what nn.Sequential of its layers does, under the same keys."""
    layers = [nn.LayerNorm(48, 1e-6), nn.GELU(), nn.Linear(48, 20), nn.GELU()]
    kept = [layers[0], *([layers[1]] if pre else []), layers[2], *([layers[3]] if post else [])]
    compare(nn.Sequential(*kept), LayerNormLinear(48, 20, pre_activation=pre, activation=post, kernels=kernels))


@pytest.mark.parametrize("size", [(32, 48), (40, 40)])
def test_patch_embed(size: tuple[int, int], kernels: str) -> None:
    """Resize, convolution, CLS and positions; a stem of other modules takes the convolution's place."""
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    embed = perturb(PatchEmbed((32, 48), 16, 3, 24, kernels=kernels))
    cls, positions = torch.randn(1, 1, 24), torch.randn(1, 7, 24)
    resized = images if size == (32, 48) else nn.functional.interpolate(images, (32, 48), mode="bicubic")
    patches = embed.proj(resized).flatten(2).transpose(1, 2)
    expected = torch.cat((cls.expand(2, -1, -1), patches), 1) + positions
    assert relative(embed(images, cls, positions), expected) < 5e-6
    stem = PatchEmbed((32, 48), 16, 3, 24, proj=nn.Sequential(embed.proj, nn.ReLU()), kernels=kernels)
    expected = torch.cat((cls.expand(2, -1, -1), patches.relu()), 1) + positions
    assert relative(stem(images, cls, positions), expected) < 5e-6


class Adapter(nn.Module):
    """What an adapter library puts in a Linear's place: it shows the old weights, and adds to their output."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 1


@pytest.mark.parametrize("path", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_replaced_layers_are_called(path: str, kernels: str) -> None:
    """A Linear that something else has replaced is called, not bypassed."""
    block = perturb(Block(48, 3, qkv_bias=True, kernels=kernels)).eval()
    with torch.no_grad():
        parent = block.get_submodule(path.rpartition(".")[0])
        name = path.rpartition(".")[2]
        linear = getattr(parent, name)
        linear.bias += 1
        expected = block(X)
        linear.bias -= 1
        setattr(parent, name, Adapter(linear))
        assert relative(block(X), expected) < 1e-6


@pytest.mark.parametrize("name", ["wq", "wk", "wv", "proj"])
def test_replaced_cross_attention_layers_are_called(name: str, kernels: str) -> None:
    """The same in cross-attention and in the projections around it."""
    block = perturb(CrossAttentionBlock(48, 3, qkv_bias=True, kernels=kernels)).eval()
    project = perturb(LayerNormLinear(48, 48, pre_activation="gelu", kernels=kernels))
    with torch.no_grad():
        for module, parent, key in (block, block.attn, name), (project, project, "2"):
            linear = getattr(parent, key)
            linear.bias += 1
            expected = module(X)
            linear.bias -= 1
            setattr(parent, key, Adapter(linear))
            assert relative(module(X), expected) < 1e-6


def test_parametrised_weights_are_used(kernels: str) -> None:
    """A weight that a parametrisation computes (weight norm, low-rank updates) is what the ops get, and its parameters
    get gradients.
    """
    block = perturb(Block(48, 3, qkv_bias=True, kernels=kernels)).eval()
    with torch.no_grad():
        expected = block(X)
        block.attn.qkv.weight /= 2

    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(block.attn.qkv, "weight", Double())
    out = block(X)
    assert relative(out, expected) < 1e-6
    out.sum().backward()
    assert block.attn.qkv.parametrizations.weight.original.grad.abs().max() > 0


def test_frozen_parameters_get_no_gradient(kernels: str) -> None:
    """Freezing some layers leaves the other gradients as they were."""
    block = perturb(Block(48, 3, qkv_bias=True, kernels=kernels))
    block(X).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in block.named_parameters()}
    block.zero_grad()
    block.attn.qkv.requires_grad_(False)
    block.norm2.requires_grad_(False)
    block(X).square().sum().backward()
    for name, parameter in block.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
        else:
            assert relative(parameter.grad, expected[name]) < 1e-5, name


def test_drop_path_scale(kernels: str) -> None:
    """One factor per sample, 0 or 1 / (1 - rate), whose mean is 1; nothing but zeros at rate 1."""
    torch.manual_seed(0)
    scale = drop_path_scale(torch.empty(20000, 3, 5), 0.3)
    assert scale.shape == (20000, 1, 1)
    assert set(scale.flatten().tolist()) == {0.0, torch.tensor(1.0).div(0.7).item()}
    assert scale.mean().item() == pytest.approx(1, abs=0.02)
    assert not drop_path_scale(torch.empty(8, 3), 1.0).any()


def test_arguments_are_checked(kernels: str) -> None:
    """Bad arguments raise and are named."""
    with pytest.raises(ValueError, match="num_heads must divide the width, got num_heads=5 for dim=48"):
        Block(48, 5, kernels=kernels)
    with pytest.raises(ValueError, match="attn_drop must be between 0 and 1, got 2"):
        Attention(48, 3, attn_drop=2, kernels=kernels)
    with pytest.raises(ValueError, match="activation must be None or 'gelu', got 'relu'"):
        LayerNormLinear(48, 48, activation="relu", kernels=kernels)
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size=16, got 40×48"):
        PatchEmbed((40, 48), 16, kernels=kernels)
    with pytest.raises(ValueError, match="fastest"):
        set_kernels(Block(48, 3), "fastest")
