"""layer_norm_mlp: every backend against the reference."""

import pytest
import torch

import inputs
from crossvit_kernels import layer_norm_mlp
from inputs import KINDS, LAYOUTS, Random
from numerics import DEVICES, PRECISIONS, Precision, assert_same_nonfinite, check, evaluate, place

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [
    ((1, 96), 384),
    ((3, 17, 96), 288),
    ((1, 577, 96), 32),
    ((1, 401, 128), 64),
    ((1, 196, 224), 672),
    ((1, 1156, 100), 7),
    ((1, 17, 384), 1152),
    ((5, 448), 1344),
    ((2, 768), 3072),
    ((2, 3, 7, 33), 65),
]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("shape, hidden", SHAPES, ids=str)
def test_shapes(backend: str, precision: Precision, shape: tuple[int, ...], hidden: int, rng: Random) -> None:
    check(layer_norm_mlp, inputs.layer_norm_mlp(rng, *shape, hidden=hidden), precision, backend)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [None, "sample", "channel"])
@pytest.mark.one_in(3)
def test_scale_and_kinds_of_tokens(
    backend: str, precision: Precision, kind: str, scale: str | None, rng: Random
) -> None:
    """A factor per sample (drop path; enough for an rms error) or per channel (LayerScale), over hard tokens."""
    given = inputs.layer_norm_mlp(rng, 20, 9, 96, hidden=200, kind=kind, scale=scale)
    check(layer_norm_mlp, given, precision, backend)


def test_a_dropped_sample_stays_as_it_is(backend: str, rng: Random) -> None:
    given = place(inputs.layer_norm_mlp(rng, 4, 5, 96, hidden=64, scale="sample"), backend)
    out = layer_norm_mlp(**given, kernels=backend)
    dropped = given["scale"].flatten() == 0
    assert dropped.any()
    assert not dropped.all()
    assert torch.equal(out[dropped], given["x"][dropped])


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_views(backend: str, precision: Precision, layout: str, rng: Random) -> None:
    given = inputs.layer_norm_mlp(rng, 3, 17, 96, hidden=100, scale="channel")
    given["x"] = inputs.arrange(given["x"], layout)
    given["w1"] = given["w1"].t().contiguous().t()
    given["w2"] = given["w2"].t().contiguous().t()
    given["b2"] = inputs.arrange(given["b2"], "every other element")
    check(layer_norm_mlp, given, precision, backend)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_without_biases_and_with_another_eps(backend: str, precision: Precision, rng: Random) -> None:
    given = inputs.layer_norm_mlp(rng, 2, 17, 96, hidden=100, bias=False)
    check(layer_norm_mlp, given | {"eps": 1e-2}, precision, backend)


@pytest.mark.parametrize("where", ["x", "w1", "w2", "b1"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.one_in(2)
def test_nonfinite_values_come_out_where_the_reference_has_them(
    backend: str, precision: Precision, where: str, value: float, rng: Random
) -> None:
    given = inputs.layer_norm_mlp(rng, 3, 17, 96, hidden=100)
    given[where].view(-1)[70] = value
    kernel, reference = (
        evaluate(layer_norm_mlp, given, precision, k, device=DEVICES[backend]) for k in (backend, "reference")
    )
    # Of gelu(+inf) torch's float64 makes inf, as the kernels do, its vectorised float32 NaN: no kind to compare.
    assert_same_nonfinite(kernel, reference, exact="" if value == -torch.inf else "out")


@pytest.mark.parametrize("scale", [None, "sample", "channel"])
def test_gradcheck_of_the_reference(scale: str | None, rng: Random) -> None:
    given = inputs.layer_norm_mlp(rng, 2, 2, 4, hidden=3, scale=scale)
    given = {n: v.double().requires_grad_() for n, v in given.items()}

    def call(*values: torch.Tensor) -> torch.Tensor:
        return layer_norm_mlp(**dict(zip(given, values)), kernels="reference")

    torch.autograd.gradcheck(call, tuple(given.values()))
    torch.autograd.gradgradcheck(call, tuple(given.values()), fast_mode=True)
