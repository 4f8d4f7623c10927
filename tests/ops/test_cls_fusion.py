"""cls_fusion: every backend against the reference; inference only."""

import pytest
import torch

import inputs
from crossvit_kernels import cls_fusion
from inputs import KINDS, LAYOUTS, Random
from numerics import PRECISIONS, Precision, check

pytestmark = pytest.mark.usefixtures("poisoned")

# batch, patches, this branch's width, the other's, heads: CrossViT's, and some that no tile divides
SHAPES = [
    (1, 1, 96, 192, 3),
    (1, 196, 192, 384, 6),
    (2, 400, 256, 128, 4),
    (9, 17, 448, 224, 7),
    (1, 577, 96, 96, 3),
    (1, 1156, 96, 64, 2),
    (2, 30, 384, 768, 12),
    (33, 5, 37, 100, 5),
]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend: str, precision: Precision, shape: tuple[int, int, int, int, int], rng: Random) -> None:
    check(cls_fusion, inputs.cls_fusion(rng, *shape), precision, backend, gradients=False)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.one_in(2)
def test_kinds_of_tokens(backend: str, precision: Precision, kind: str, bias: bool, rng: Random) -> None:
    given = inputs.cls_fusion(rng, 3, 48, 64, 96, 3, kind=kind, bias=bias)
    check(cls_fusion, given, precision, backend, gradients=False)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_views(backend: str, precision: Precision, layout: str, rng: Random) -> None:
    given = inputs.cls_fusion(rng, 3, 20, 64, 96, 3)
    given["patches"] = inputs.arrange(given["patches"], layout)
    given["cls"] = inputs.arrange(given["cls"], "every other element")
    for name in ("proj_weight", "q_weight", "k_weight", "v_weight", "out_weight", "revert_weight"):
        given[name] = given[name].t().contiguous().t()
    check(cls_fusion, given | {"eps": 1e-3}, precision, backend, gradients=False)


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_a_gradient_that_would_be_needed_raises(kernels: str, rng: Random) -> None:
    given = inputs.cls_fusion(rng, 2, 5, 12, 16, 2)
    given["v_weight"].requires_grad_()
    with pytest.raises(RuntimeError, match="inference"):
        cls_fusion(**given, kernels=kernels)
    with torch.no_grad():
        cls_fusion(**given, kernels=kernels)
