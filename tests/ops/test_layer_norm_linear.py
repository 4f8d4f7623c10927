"""layer_norm_linear: every backend against the reference."""

import pytest
import torch

import inputs
from crossvit_kernels import layer_norm_linear
from inputs import KINDS, LAYOUTS, Random
from numerics import DEVICES, PRECISIONS, Precision, assert_same_nonfinite, check, evaluate, place

pytestmark = pytest.mark.usefixtures("poisoned")

# Widths and lengths of CrossViT's branches, and some that no tile divides: (..., D) -> E
SHAPES = [
    ((1, 96), 192),
    ((3, 17, 96), 288),
    ((1, 577, 96), 32),
    ((1, 401, 128), 64),
    ((1, 197, 192), 48),
    ((1, 196, 224), 224),
    ((1, 1156, 100), 7),
    ((1, 17, 384), 1152),
    ((1, 50, 448), 448),
    ((5, 768), 768),
    ((2, 3, 7, 33), 65),
    ((4, 5), 1),
]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("shape, out", SHAPES, ids=str)
def test_shapes(backend: str, precision: Precision, shape: tuple[int, ...], out: int, rng: Random) -> None:
    check(layer_norm_linear, inputs.layer_norm_linear(rng, *shape, out=out), precision, backend)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("shape, out", [((260, 96), 200), ((128, 192), 520), ((2, 130, 100), 129)], ids=str)
def test_largest_tiles(
    backend: str, precision: Precision, shape: tuple[int, ...], out: int, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a single multiprocessor, where the emulated kernels' tiles for large inputs serve small ones."""
    monkeypatch.setenv("CROSSVIT_KERNELS_EMULATE_MULTIPROCESSORS", "1")
    check(layer_norm_linear, inputs.layer_norm_linear(rng, *shape, out=out), precision, backend)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pre_activation", [None, "gelu"])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.one_in(2)
def test_activations_and_kinds_of_tokens(
    backend: str, precision: Precision, kind: str, pre_activation: str | None, activation: str | None, rng: Random
) -> None:
    given = inputs.layer_norm_linear(rng, 2, 33, 96, out=80, kind=kind)
    check(layer_norm_linear, given | {"pre_activation": pre_activation, "activation": activation}, precision, backend)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_views(backend: str, precision: Precision, layout: str, rng: Random) -> None:
    given = inputs.layer_norm_linear(rng, 3, 17, 96, out=100)
    given["x"] = inputs.arrange(given["x"], layout)
    given["weight"] = given["weight"].t().contiguous().t()
    given["bias"] = inputs.arrange(given["bias"], "every other element")
    check(layer_norm_linear, given | {"activation": "gelu"}, precision, backend)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_without_biases_and_with_another_eps(backend: str, precision: Precision, rng: Random) -> None:
    given = inputs.layer_norm_linear(rng, 2, 17, 96, out=100, bias=False)
    check(layer_norm_linear, given | {"eps": 1e-2}, precision, backend)


def test_constant_tokens_are_exact(backend: str, rng: Random) -> None:
    """Without variance the normalised token is exactly 0, whatever its value: what is left is Linear(norm_bias)."""
    given = inputs.layer_norm_linear(rng, 64, 96, out=48)
    given["x"] = (rng.normal(64, 1) * 100).expand(64, 96)
    expected = given["weight"] @ given["norm_bias"] + given["bias"]
    out = layer_norm_linear(**place(given, backend), kernels=backend).cpu()
    assert (out - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    "where, value", [("x", torch.nan), ("x", torch.inf), ("weight", torch.nan), ("weight", -torch.inf)]
)
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.one_in(2)
def test_nonfinite_values_come_out_where_the_reference_has_them(
    backend: str, precision: Precision, where: str, value: float, rng: Random
) -> None:
    given = inputs.layer_norm_linear(rng, 3, 17, 96, out=100) | {"activation": "gelu"}
    given[where].view(-1)[1000] = value
    kernel, reference = (
        evaluate(layer_norm_linear, given, precision, k, device=DEVICES[backend]) for k in (backend, "reference")
    )
    # Of gelu(+inf) torch's float64 makes inf, as the kernels do, its vectorised float32 NaN: no kind to compare.
    assert_same_nonfinite(kernel, reference, exact="" if value == -torch.inf else "out")


@pytest.mark.parametrize("pre_activation, activation", [("gelu", None), (None, "gelu")])
def test_gradcheck_of_the_reference(pre_activation: str | None, activation: str | None, rng: Random) -> None:
    given = {n: v.double().requires_grad_() for n, v in inputs.layer_norm_linear(rng, 2, 3, 5, out=4).items()}
    activations = {"pre_activation": pre_activation, "activation": activation}

    def call(*values: torch.Tensor) -> torch.Tensor:
        return layer_norm_linear(**dict(zip(given, values)), **activations, kernels="reference")

    torch.autograd.gradcheck(call, tuple(given.values()))
    torch.autograd.gradgradcheck(call, tuple(given.values()), fast_mode=True)


def test_float64_is_served_by_the_reference(backend: str, rng: Random) -> None:
    given = inputs.layer_norm_linear(rng, 2, 3, 5, out=4)
    double = place({n: v.double() for n, v in given.items()}, backend)
    assert torch.equal(layer_norm_linear(**double, kernels=backend), layer_norm_linear(**double, kernels="reference"))
