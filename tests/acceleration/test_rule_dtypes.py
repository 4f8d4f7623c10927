"""The rule for when to fuse, as to dtypes and devices: norms in float32 in a model of 16 bits, float64, and tensors
without memory."""

import copy

import pytest
import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from crossvit_kernels import accelerate
from rule import SITES, assert_same_bits, in_turn, outcome
from timm_models import build, images, swapped
from weights import CPU_BACKENDS, our_model, timm_model

HALVES = [torch.bfloat16, torch.float16]
NORMS = (nn.LayerNorm,)


def lowered(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """In `dtype`, but for the norms, as CLIP's training code leaves them."""
    module.to(dtype)
    for child in module.modules():
        if isinstance(child, NORMS):
            child.float()
    return module


def moved(inputs: object, *where: torch.dtype | str) -> object:
    """The tensors in `inputs`, on another device or in another dtype."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to(*where), inputs)


@in_turn(dtype=HALVES, site=SITES)
def test_norms_in_float32_in_a_model_of_16_bits(site: str, dtype: torch.dtype, kernels: str) -> None:
    """Output and gradients are as near to float64's as plain PyTorch's are, by the rule for an op, and of the same
    dtypes."""
    where = SITES[site]
    ours, twin = where.pair(kernels)
    for module in (ours, twin):
        lowered(module, dtype)
    exact = outcome(copy.deepcopy(twin).double(), moved(moved(where.inputs(), dtype), torch.float64))
    found, plain = (outcome(module, moved(where.inputs(), dtype)) for module in (ours, twin))
    assert found.keys() == plain.keys()
    largest = max(value.square().mean().sqrt().item() for key, value in exact.items() if "output" not in key)
    for key, value in exact.items():
        assert found[key].dtype is plain[key].dtype, key
        errors = [(r[key].double() - value).square().mean().sqrt().item() for r in (found, plain)]
        scale = value.square().mean().sqrt().item()
        if scale < 1e-6 * largest:  # zero by mathematics: the gradient of a key's bias
            scale = largest
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * scale, key


@in_turn(gradients=[True, False], name=["deit_tiny_patch16_224", "siglip", "cait_xxs24_224", "crossvit_9_240"])
def test_whole_models_with_norms_in_float32(name: str, gradients: bool, kernels: str) -> None:
    model = lowered(build(name), torch.bfloat16)
    x = images(model).bfloat16()
    exact = copy.deepcopy(model).double()(x.double())
    with torch.set_grad_enabled(gradients):
        plain = model(x)
        found = accelerate(model, kernels, verbose=False)(x)
    assert found.dtype is plain.dtype
    errors = [(y.double() - exact).square().mean().sqrt().item() for y in (found, plain)]
    assert errors[0] <= 2 * errors[1] + 2**-7 * exact.square().mean().sqrt().item()


@pytest.mark.parametrize("kernels", CPU_BACKENDS)
def test_our_models_with_norms_in_float32(kernels: str) -> None:
    plain = timm_model("crossvit_tiny_240", depth=((1, 1, 0),), num_classes=7)
    model = our_model("crossvit_tiny_240", plain, depth=((1, 1, 0),), num_classes=7, kernels=kernels)
    x = torch.randn(2, 3, 240, 240, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = copy.deepcopy(plain).bfloat16().double()(x.double())
    expected, found = (lowered(m, torch.bfloat16)(x) for m in (plain, model))
    assert found.dtype is expected.dtype
    errors = [(y.double() - exact).square().mean().sqrt().item() for y in (found, expected)]
    assert errors[0] <= 2 * errors[1] + 2**-7 * exact.square().mean().sqrt().item()


@in_turn(site=SITES)
def test_float64_is_float64_throughout(site: str, kernels: str) -> None:
    """As near to plain PyTorch's as roundings of float64 let it be: nothing on the way is float32."""
    where = SITES[site]
    ours, twin = where.pair(kernels)
    inputs = moved(where.inputs(), torch.float64)
    found, expected = (outcome(module.double(), inputs) for module in (ours, twin))
    largest = max(value.abs().max().item() for key, value in expected.items() if "output" not in key)
    for key, value in expected.items():
        scale = max(value.abs().max().item(), 0 if "output" in key else largest)
        assert (found[key] - value).abs().max().item() <= 1e-13 * scale, key


@pytest.mark.parametrize("kernels", CPU_BACKENDS)
def test_gradcheck_of_attention_pooling(kernels: str) -> None:
    """Numerical derivatives in float64, which a softmax in float32 would not have."""
    torch.manual_seed(0)
    plain = AttentionPoolLatent(8, num_heads=2).double().eval()
    pool = accelerate(copy.deepcopy(plain), kernels, verbose=False)
    assert swapped(pool)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pool, (x,))
    torch.testing.assert_close(pool(x), plain(x), rtol=1e-13, atol=1e-13)


def not_native(kernels: str) -> str:
    """A backend asked for by its name refuses tensors that are not on its device; the choice is left to "auto"."""
    return kernels if kernels == "reference" else "auto"


@in_turn(site=SITES)
def test_on_meta(site: str, kernels: str) -> None:
    """Shapes and dtypes without memory, as plain modules give them, in every floating-point dtype."""
    where = SITES[site]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        ours, twin = (module.to("meta", dtype) for module in where.pair(not_native(kernels)))
        inputs = moved(where.inputs(), "meta", dtype)
        found, expected = (outcome(module, inputs) for module in (ours, twin))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].device.type == "meta"
            assert (found[key].shape, found[key].dtype) == (value.shape, value.dtype), key


@in_turn(name=["deit_tiny_patch16_224", "siglip", "cait_xxs24_224", "crossvit_9_240", "crossvit_9_dagger_240"])
def test_whole_models_on_meta(name: str, kernels: str) -> None:
    """Built on meta or moved there, with and without gradients."""
    model = accelerate(build(name).to("meta"), not_native(kernels), verbose=False)
    x = images(model).to("meta")
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            found = model(x)
        assert (found.shape, found.device.type) == ((2, 10), "meta")
    model(x).sum().backward()


@pytest.mark.parametrize("kernels", CPU_BACKENDS)
def test_autocast_over_norms_in_any_dtype(kernels: str) -> None:
    """Dtypes of what comes out under autocast are plain PyTorch's."""
    for key in ("timm Block", "nn.Block", "CaiT LayerScaleBlockClassAttn", "SigLIP AttentionPoolLatent"):
        where = SITES[key]
        ours, twin = where.pair(kernels)
        for norms in (torch.float32, torch.bfloat16):
            for module in (ours, twin):
                for child in module.modules():
                    if isinstance(child, NORMS):
                        child.to(norms)
            with torch.autocast("cpu", torch.bfloat16):
                try:
                    expected = outcome(twin, where.inputs())
                except RuntimeError:  # plain PyTorch has no such norm
                    continue
                found = outcome(ours, where.inputs())
            assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in expected.items()}


@in_turn(site=SITES)
def test_dtypes_that_plain_modules_refuse_are_refused(site: str, kernels: str) -> None:
    """A Linear in another dtype than what reaches it raises an error, and works again when it is back."""
    where = SITES[site]
    ours, twin = where.pair(kernels)
    expected = outcome(ours, where.inputs())
    for module in (ours, twin):
        module.get_submodule(where.linears[0]).double()
        with pytest.raises((RuntimeError, TypeError)):
            module(*where.inputs())
        module.get_submodule(where.linears[0]).float()
    assert_same_bits(outcome(ours, where.inputs()), expected)
