"""linear_residual: every backend against the reference."""

import pytest
import torch

import inputs
from crossvit_kernels import linear_residual
from inputs import LAYOUTS, Random
from numerics import DEVICES, PRECISIONS, Precision, assert_same_nonfinite, check, evaluate, place

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [
    ((1, 96), 96),
    ((3, 17, 96), 192),
    ((1, 577, 96), 32),
    ((1, 401, 128), 64),
    ((1, 196, 224), 224),
    ((1, 1156, 100), 7),
    ((1, 17, 1152), 384),
    ((5, 768), 768),
    ((2, 3, 7, 33), 65),
    ((1, 1), 1),
]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("shape, out", SHAPES, ids=str)
def test_shapes(backend: str, precision: Precision, shape: tuple[int, ...], out: int, rng: Random) -> None:
    check(linear_residual, inputs.linear_residual(rng, *shape, out=out), precision, backend)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("scale", ["sample", "channel"])
@pytest.mark.parametrize("shape, out", [((32, 192), 96), ((20, 17, 96), 100), ((16, 3, 5, 33), 65)], ids=str)
def test_scale(backend: str, precision: Precision, scale: str, shape: tuple[int, ...], out: int, rng: Random) -> None:
    """A factor per sample (drop path) or per channel (LayerScale); enough samples to speak of an rms error."""
    check(linear_residual, inputs.linear_residual(rng, *shape, out=out, scale=scale), precision, backend)


def test_a_dropped_sample_is_its_residual(backend: str, rng: Random) -> None:
    given = place(inputs.linear_residual(rng, 4, 5, 96, out=64, scale="sample"), backend)
    out = linear_residual(**given, kernels=backend)
    dropped = given["scale"].flatten() == 0
    assert dropped.any()
    assert not dropped.all()
    assert torch.equal(out[dropped], given["residual"][dropped])


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_views(backend: str, precision: Precision, layout: str, rng: Random) -> None:
    given = inputs.linear_residual(rng, 3, 17, 96, out=100, scale="channel")
    given["x"] = inputs.arrange(given["x"], layout)
    given["residual"] = inputs.arrange(given["residual"], LAYOUTS[LAYOUTS.index(layout) - 1])
    given["weight"] = given["weight"].t().contiguous().t()
    given["scale"] = inputs.arrange(given["scale"], "every other element")
    check(linear_residual, given, precision, backend)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_without_bias(backend: str, precision: Precision, rng: Random) -> None:
    check(linear_residual, inputs.linear_residual(rng, 2, 17, 96, out=100, bias=False), precision, backend)


@pytest.mark.parametrize("residual, scale", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")])
def test_the_result_has_the_dtype_to_which_the_terms_promote(
    backend: str, residual: str, scale: str, rng: Random
) -> None:
    given = inputs.linear_residual(rng, 2, 5, 96, out=64, scale="channel")
    given = {name: value.bfloat16() for name, value in given.items()}
    given["residual"] = given["residual"].to(getattr(torch, residual))
    given["scale"] = given["scale"].to(getattr(torch, scale))
    given = place(given, backend)
    out, expected = (linear_residual(**given, kernels=k) for k in (backend, "reference"))
    assert out.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("where", ["x", "weight", "residual", "bias"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.one_in(2)
def test_nonfinite_values_come_out_where_the_reference_has_them(
    backend: str, precision: Precision, where: str, value: float, rng: Random
) -> None:
    given = inputs.linear_residual(rng, 3, 17, 96, out=100, scale="channel")
    given[where].view(-1)[70] = value
    kernel, reference = (
        evaluate(linear_residual, given, precision, k, device=DEVICES[backend]) for k in (backend, "reference")
    )
    assert_same_nonfinite(kernel, reference)


@pytest.mark.parametrize("scale", [None, "sample", "channel"])
def test_gradcheck_of_the_reference(scale: str | None, rng: Random) -> None:
    given = {
        n: v.double().requires_grad_() for n, v in inputs.linear_residual(rng, 2, 3, 5, out=4, scale=scale).items()
    }

    def call(*values: torch.Tensor) -> torch.Tensor:
        return linear_residual(**dict(zip(given, values)), kernels="reference")

    torch.autograd.gradcheck(call, tuple(given.values()))
    torch.autograd.gradgradcheck(call, tuple(given.values()), fast_mode=True)
