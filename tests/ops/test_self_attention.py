"""self_attention: every backend against the reference."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import inputs
from crossvit_kernels import self_attention
from inputs import LAYOUTS, Random
from numerics import PRECISIONS, Precision, assert_same_nonfinite, check, evaluate

pytestmark = pytest.mark.usefixtures("poisoned")

# batch, tokens, width, heads: head widths 32 and 64 as in CrossViT, and some that no tile divides
SHAPES = [
    (1, 1, 96, 3),
    (2, 17, 192, 6),
    (1, 196, 96, 3),
    (1, 401, 128, 4),
    (1, 197, 384, 6),
    (2, 65, 448, 7),
    (1, 577, 64, 1),
    (1, 1157, 32, 1),
    (2, 50, 100, 5),
    (1, 33, 768, 12),
    (3, 40, 21, 3),
    (1, 30, 256, 2),
]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend: str, precision: Precision, shape: tuple[int, int, int, int], rng: Random) -> None:
    check(self_attention, inputs.self_attention(rng, *shape), precision, backend)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_views(backend: str, precision: Precision, layout: str, rng: Random) -> None:
    given = inputs.self_attention(rng, 3, 33, 96, 3)
    given["qkv"] = inputs.arrange(given["qkv"], layout)
    check(self_attention, given, precision, backend)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("kind", ["sharp", "one key wins", "equal keys"])
def test_kinds_of_scores(backend: str, precision: Precision, kind: str, rng: Random) -> None:
    """Scores in the hundreds, where a softmax without its maximum overflows; one key far above; all keys the same."""
    given = inputs.self_attention(rng, 2, 70, 96, 3)
    q, k, _ = given["qkv"].chunk(3, dim=-1)
    if kind == "sharp":
        q *= 30
    elif kind == "one key wins":
        k[:, 41] += 50
    else:
        k[:] = k[:, :1].clone()
    check(self_attention, given, precision, backend)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.one_in(2)
def test_nonfinite_values_come_out_where_the_reference_has_them(
    backend: str, precision: Precision, value: float, part: int, rng: Random
) -> None:
    given = inputs.self_attention(rng, 2, 70, 96, 3)
    given["qkv"][1, 40, part * 96 + 5] = value
    kernel = evaluate(self_attention, given, precision, backend)
    with sdpa_kernel(SDPBackend.MATH):  # on a CPU the fused one loses the NaN of an infinite score
        reference = evaluate(self_attention, given, precision, "reference")
    assert_same_nonfinite(kernel, reference)


def test_gradcheck_of_the_reference(rng: Random) -> None:
    qkv = rng.normal(2, 3, 12).double().requires_grad_()
    torch.autograd.gradcheck(lambda t: self_attention(t, 2, kernels="reference"), (qkv,))
