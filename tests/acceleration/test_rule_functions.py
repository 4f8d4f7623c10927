"""Functions of torch.nn.functional that somebody replaced, and weights that became something else after a first call,
are met as plain PyTorch meets them."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import crossvit_kernels
from weights import perturb

FUNCTIONS = ("linear", "layer_norm", "gelu", "conv2d", "scaled_dot_product_attention")
MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5
    ),
    "crossvit": lambda: timm.create_model(
        "crossvit_tiny_240", num_classes=5, embed_dim=(16, 32), depth=((1, 1, 0),), num_heads=(2, 2)
    ),
}


def pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model, the same accelerated, which has run once, and images."""
    plain = perturb(MODELS[name]()).eval()
    fast = copy.deepcopy(plain)
    crossvit_kernels.accelerate(fast)
    side = 32 if name == "vit" else 240
    images = torch.randn(1, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(fast(images), plain(images), rtol=1e-4, atol=1e-4)
    return plain, fast, images


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("grad", [False, True])
def test_a_replaced_function_is_called(name: str, function: str, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast, images = pair(name)
    before, original = plain(images), getattr(F, function)
    monkeypatch.setattr(F, function, lambda *args, **others: original(*args, **others) * 1.25)
    with torch.set_grad_enabled(grad):
        expected, found = plain(images), fast(images)
    assert not torch.allclose(expected, before, rtol=1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    monkeypatch.undo()
    with torch.no_grad():
        torch.testing.assert_close(fast(images), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_weight_that_becomes_sparse_after_a_call(name: str, grad: bool) -> None:
    plain, fast, images = pair(name)
    for model in (plain, fast):
        for module in model.modules():
            if type(module) is nn.Linear:
                module.weight = nn.Parameter(module.weight.detach().to_sparse_csr(), requires_grad=False)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(fast(images), plain(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_an_attribute_that_hides_a_parameter(name: str) -> None:
    plain, fast, images = pair(name)
    for model in (plain, fast):
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__dict__["weight"] = module.weight.detach() * 1.3
    with torch.no_grad():
        torch.testing.assert_close(fast(images), plain(images), rtol=1e-5, atol=1e-5)
