"""bicubic_resize: every backend against the reference, torch.nn.functional.interpolate."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import inputs
from crossvit_kernels import backends, bicubic_resize
from crossvit_kernels.nn import PatchEmbed
from inputs import LAYOUTS, Random
from numerics import PRECISIONS, Precision, assert_same_nonfinite, check, evaluate

pytestmark = pytest.mark.usefixtures("poisoned")
ALL = [name for name in backends.BACKENDS if backends.available(name)]

# Up, down, both at once, sizes that no vector divides, rows shorter than a vector, taps far apart.
SIZES = [
    ((240, 240), 224),
    ((60, 60), 56),
    ((45, 70), (56, 42)),
    ((28, 28), (70, 84)),
    ((33, 64), (33, 60)),
    ((33, 64), (65, 64)),
    ((3, 100), (14, 28)),
    ((100, 3), (3, 5)),
    ((70, 300), (9, 17)),
    ((9, 400), (12, 3)),
    ((1, 1), 28),
    ((40, 30), 1),
    ((1, 17), (16, 1)),
    ((2, 31), (129, 33)),
]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("size, image_size", SIZES, ids=str)
def test_sizes(
    backend: str, precision: Precision, size: tuple[int, int], image_size: int | tuple[int, int], rng: Random
) -> None:
    check(bicubic_resize, inputs.bicubic_resize(rng, 2, *size, image_size), precision, backend)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("layout", [*LAYOUTS, "channels last", "cropped"])
def test_strided_views(backend: str, precision: Precision, layout: str, rng: Random) -> None:
    given = inputs.bicubic_resize(rng, 2, 32, 40, (35, 24), channels=4)
    images = given["images"]
    if layout == "channels last":
        given["images"] = images.contiguous(memory_format=torch.channels_last)
    elif layout == "cropped":
        around = images.new_full((2, 4, 37, 44), torch.nan)
        around[:, :, 3:35, 1:41] = images
        given["images"] = around[:, :, 3:35, 1:41]
    else:
        given["images"] = inputs.arrange(images, layout)
    check(bicubic_resize, given, precision, backend)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [(0, 0), (13, 17), (31, 47)], ids=str)
@pytest.mark.parametrize("image_size", [(24, 40), (32, 40), (64, 48)], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.one_in(2)
def test_nonfinite_values_come_out_where_the_reference_has_them(
    backend: str,
    precision: Precision,
    image_size: tuple[int, int],
    where: tuple[int, int],
    value: float,
    rng: Random,
) -> None:
    """Also where an axis keeps its size, so that taps' weights are zero, and next to the border."""
    given = inputs.bicubic_resize(rng, 2, 32, 48, image_size)
    given["images"][1, 2, where[0], where[1]] = value
    kernel, reference = (evaluate(bicubic_resize, given, precision, k) for k in (backend, "reference"))
    assert_same_nonfinite(kernel, reference)


@pytest.mark.parametrize("kernels", ALL)
def test_images_of_the_size_wanted_come_back_themselves(kernels: str, rng: Random) -> None:
    images = rng.normal(2, 3, 8, 12)
    assert bicubic_resize(images, (8, 12), kernels=kernels) is images
    assert bicubic_resize(images[..., :8], 8, kernels=kernels).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("kernels", ALL)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_dtype_is_the_images(dtype: torch.dtype, autocast: bool, kernels: str, rng: Random) -> None:
    images = rng.normal(1, 2, 9, 7).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = bicubic_resize(images, (6, 11), kernels=kernels)
        expected = F.interpolate(images, (6, 11), mode="bicubic", align_corners=False)
    assert out.dtype == expected.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps if dtype.itemsize < 4 else 1e-4  # torch's positions are float32
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernels", ALL)
def test_a_stem_sees_resized_images(kernels: str, rng: Random) -> None:
    """PatchEmbed with another projection than the op's: forward and the gradient of the images."""
    stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 4, 4))
    embed = PatchEmbed((24, 32), 8, 3, 8, proj=stem, kernels=kernels)
    cls, positions = torch.zeros(1, 1, 8), torch.zeros(1, 13, 8)
    images = rng.normal(2, 3, 30, 30).requires_grad_()
    resized = F.interpolate(images, (24, 32), mode="bicubic", align_corners=False)
    expected = stem(resized).flatten(2).mT
    found = embed(images, cls, positions)[:, 1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    gradients = [torch.autograd.grad(out.square().sum(), images)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * gradients[1].abs().max().item())


@pytest.mark.parametrize(
    "image_size, error",
    [
        (0, ValueError),
        ((8, -4), ValueError),
        ((8,), TypeError),
        ((8, 8, 8), TypeError),
        ("8", TypeError),
        (8.0, TypeError),
        (True, TypeError),
        (None, TypeError),
    ],
)
def test_a_wrong_image_size_is_named(image_size: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^image_size.*: expected .* got"):
        bicubic_resize(torch.ones(1, 3, 8, 8), image_size)


@pytest.mark.parametrize("shape", [(1, 0, 8, 8), (1, 3, 0, 8), (1, 3, 8, 0)], ids=str)
def test_a_side_of_zero_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^images' smallest side: expected at least 1, got 0"):
        bicubic_resize(torch.ones(shape), 4)


def test_gradcheck_of_the_reference(rng: Random) -> None:
    images = rng.normal(1, 2, 5, 4).double().requires_grad_()
    torch.autograd.gradcheck(lambda t: bicubic_resize(t, (3, 6), kernels="reference"), (images,))
