"""patch_embed: every backend against the reference."""

import pytest
import torch
import torch.nn.functional as F

import inputs
from crossvit_kernels import patch_embed
from inputs import LAYOUTS, Random
from numerics import DEVICES, PRECISIONS, Precision, assert_same_nonfinite, check, evaluate, place

pytestmark = pytest.mark.usefixtures("poisoned")

# batch, height, width, patch, embed: CrossViT's patches at small sizes, and some that no tile divides
SHAPES = [
    (1, 240, 240, 12, 32),
    (2, 48, 36, 12, 96),
    (1, 224, 224, 16, 32),
    (3, 48, 64, 16, 192),
    (2, 16, 16, 16, 384),
    (1, 32, 48, 16, 768),
    (2, 35, 21, 7, 100),
    (1, 6, 4, 1, 5),
]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend: str, precision: Precision, shape: tuple[int, ...], rng: Random) -> None:
    batch, height, width, patch, embed = shape
    check(patch_embed, inputs.patch_embed(rng, batch, height, width, patch=patch, embed=embed), precision, backend)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize(
    "size, image_size",
    [
        ((60, 60), 56),
        ((45, 70), (56, 42)),
        ((28, 28), (70, 84)),
        ((56, 56), 56),
        ((240, 240), 224),
        ((3, 100), (14, 28)),
        ((1, 1), 28),
    ],
    ids=str,
)
def test_resize(
    backend: str, precision: Precision, size: tuple[int, int], image_size: int | tuple[int, int], rng: Random
) -> None:
    """Bicubic, up and down, square and not."""
    given = inputs.patch_embed(rng, 2, *size, patch=14, embed=32, image_size=image_size)
    check(patch_embed, given, precision, backend)


def test_resize_is_interpolate(backend: str, rng: Random) -> None:
    given = place(inputs.patch_embed(rng, 2, 60, 50, patch=8, embed=16, image_size=(64, 32)), backend)
    resized = F.interpolate(given["images"], (64, 32), mode="bicubic", align_corners=False)
    out = patch_embed(**given, kernels=backend)
    expected = patch_embed(**(given | {"images": resized, "image_size": None}), kernels="reference")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("image_size", [None, (24, 40)])
@pytest.mark.parametrize("layout", [*LAYOUTS, "channels last"])
def test_strided_views(
    backend: str, precision: Precision, layout: str, image_size: tuple[int, int] | None, rng: Random
) -> None:
    given = inputs.patch_embed(rng, 2, 32, 40, patch=8, embed=48, image_size=image_size)
    if layout == "channels last":
        given["images"] = given["images"].contiguous(memory_format=torch.channels_last)
        given["weight"] = given["weight"].contiguous(memory_format=torch.channels_last)
    else:
        given["images"] = inputs.arrange(given["images"], layout)
    given["pos_embed"] = given["pos_embed"].mT.contiguous().mT
    check(patch_embed, given, precision, backend)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("channels", [1, 4])
def test_other_channel_counts_without_bias(backend: str, precision: Precision, channels: int, rng: Random) -> None:
    given = inputs.patch_embed(rng, 2, 32, 48, patch=16, embed=48, channels=channels, bias=False)
    check(patch_embed, given, precision, backend)


@pytest.mark.parametrize("where", ["images", "weight", "pos_embed", "cls_token"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("image_size", [None, (24, 40)])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.one_in(2)
def test_nonfinite_values_come_out_where_the_reference_has_them(
    backend: str, precision: Precision, image_size: tuple[int, int] | None, where: str, value: float, rng: Random
) -> None:
    given = inputs.patch_embed(rng, 2, 32, 48, patch=8, embed=48, image_size=image_size)
    given[where].view(-1)[30] = value
    kernel, reference = (
        evaluate(patch_embed, given, precision, k, device=DEVICES[backend]) for k in (backend, "reference")
    )
    assert_same_nonfinite(kernel, reference)


@pytest.mark.parametrize("image_size", [None, (4, 6)])
def test_gradcheck_of_the_reference(image_size: tuple[int, int] | None, rng: Random) -> None:
    given = inputs.patch_embed(rng, 1, 6, 4, patch=2, embed=3, channels=2, image_size=image_size)
    tensors = {n: v.double().requires_grad_() for n, v in given.items() if n != "image_size"}

    def call(*values: torch.Tensor) -> torch.Tensor:
        return patch_embed(**dict(zip(tensors, values)), image_size=image_size, kernels="reference")

    torch.autograd.gradcheck(call, tuple(tensors.values()))
