"""Whole models on the GPUs' kernels: a narrow CrossViT interpreted and emulated, the paper's on a GPU."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import crossvit
import crossvit_kernels
from available import GPU
from benchmarks.photographs import photographs
from crossvit_kernels import backends
from weights import our_model, relative

KERNELS = [name for name in ("triton", "cuda") if backends.available(name)]
pytestmark = [*([pytest.mark.gpu] if GPU else []), pytest.mark.parametrize("kernels", KERNELS)]

NARROW = dict(image_size=48, embed_dim=(32, 64), num_heads=(2, 2), depth=((1, 1, 0), (1, 1, 0)), num_classes=10)
FULL = ("crossvit_9_240", "crossvit_15_dagger_240", "crossvit_small_240", "crossvit_base_240")
DEVICE = "cuda" if GPU else "cpu"


@pytest.fixture
def exact_float32() -> Iterator[None]:
    """float32 means float32 on a GPU, also in the convolutions, whose default is TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def model_and_images(name: str, **arguments: object) -> tuple[crossvit.CrossViT, Tensor]:
    model = our_model(name, **arguments).to(DEVICE)
    return model, photographs(2, model.image_size).to(DEVICE)


def gradients(model: crossvit.CrossViT, images: Tensor, kernels: str) -> dict[str, Tensor]:
    """The logits and the gradient of every parameter, in training with drop path."""
    model.set_kernels(kernels)
    model.train().zero_grad()
    torch.manual_seed(0)
    logits = model(images)
    F.cross_entropy(logits.float(), torch.arange(len(images), device=images.device)).backward()
    found = {"logits": logits.detach()}
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        found[parameter_name] = parameter.grad.clone()
    return found


def assert_trains_as_the_reference(model: crossvit.CrossViT, images: Tensor, kernels: str) -> None:
    found, expected = gradients(model, images, kernels), gradients(model, images, "reference")
    for name, value in found.items():
        if name.endswith("wk.bias"):
            assert value.abs().max() < 1e-6, name
        elif expected[name].abs().max() > 0:
            assert relative(value, expected[name]) < 2e-4, name


@pytest.mark.parametrize("name", ["crossvit_9_240", "crossvit_9_dagger_240"])
def test_a_narrow_model_infers_and_trains_as_the_reference(name: str, kernels: str, exact_float32: None) -> None:
    """All parts of a CrossViT: both branches, one of them resized, fusion both ways, drop path, heads."""
    model, images = model_and_images(name, drop_path_rate=0.3, **NARROW)
    with torch.no_grad():
        model.set_kernels("reference")
        expected = model.eval()(images)
        model.set_kernels(kernels)
        assert relative(model(images), expected) < 5e-6
    assert_trains_as_the_reference(model, images, kernels)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FULL)
def test_a_full_model_trains_as_the_reference(name: str, kernels: str, exact_float32: None) -> None:
    assert_trains_as_the_reference(*model_and_images(name, drop_path_rate=0.1), kernels)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-6), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("name", FULL)
def test_a_full_models_logits_are_the_references(
    name: str, kernels: str, dtype: torch.dtype, tolerance: float, exact_float32: None
) -> None:
    """In each dtype against the reference in float64; eager without a synchronisation, and as a CUDA graph."""
    model, images = model_and_images(name)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()
        exact.set_kernels("reference")
        expected = exact(images.double())
        model, images = model.to(dtype), images.to(dtype)
        model.set_kernels(kernels)
        out = model(images)
        assert relative(out, expected) < tolerance
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = model(images)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(again, out)
        graphed = crossvit_kernels.graphed(model, images)
        assert torch.equal(graphed(images), out)


@pytest.mark.gpu
def test_a_full_model_is_one_graph_for_the_compiler(kernels: str, exact_float32: None) -> None:
    model, images = model_and_images("crossvit_9_240")
    model.set_kernels(kernels)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        assert relative(compiled(images), model(images)) < 5e-6
