"""cls_cross_attention: every backend against the reference, which forms the keys and values that kernels do without."""

import pytest
import torch
from torch import Tensor, nn

import inputs
from crossvit_kernels import backends, cls_cross_attention
from inputs import KINDS, LAYOUTS, Random
from numerics import DEVICES, FLOAT32, PRECISIONS, Precision, assert_same_nonfinite, check, evaluate, place

pytestmark = pytest.mark.usefixtures("poisoned")

ZERO = {"grad k_bias": 0.0}  # by mathematics; the kernels return zeros

# batch, patches, width, heads: CrossViT's, and some that no tile divides
SHAPES = [
    (1, 1, 96, 3),
    (3, 17, 192, 6),
    (1, 196, 384, 6),
    (1, 400, 128, 4),
    (9, 64, 224, 7),
    (1, 577, 96, 3),
    (1, 1156, 192, 6),
    (1, 40, 768, 12),
    (5, 30, 448, 7),
    (2, 33, 100, 5),
    (33, 5, 36, 1),
    (2, 0, 96, 3),
]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend: str, precision: Precision, shape: tuple[int, int, int, int], rng: Random) -> None:
    zero = dict(ZERO)
    if shape[1] == 0:  # with the CLS token alone the softmax is constant
        zero |= dict.fromkeys(("grad q_weight", "grad q_bias", "grad k_weight"), 1.0) | {"grad k_bias": 1.0}
    check(cls_cross_attention, inputs.cls_cross_attention(rng, *shape), precision, backend, zero=zero)


@pytest.mark.parametrize("seed", [0, 2, 5])
@pytest.mark.parametrize("shape", [(1, 1, 96, 3), (3, 1, 96, 3), (3, 4, 36, 1)], ids=str)
def test_few_tokens(backend: str, shape: tuple[int, int, int, int], seed: int) -> None:
    """The scores' gradients, whose sum is zero, are small differences of large numbers here: of what rounding leaves of
    the sum the projections' gradients would have more than half their error."""
    check(cls_cross_attention, inputs.cls_cross_attention(Random(seed), *shape), FLOAT32, backend, zero=ZERO)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.one_in(2)
def test_kinds_of_tokens(backend: str, precision: Precision, kind: str, bias: bool, rng: Random) -> None:
    given = inputs.cls_cross_attention(rng, 3, 48, 96, 3, kind=kind, bias=bias)
    check(cls_cross_attention, given, precision, backend, zero=ZERO)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_sharp_scores(backend: str, precision: Precision, rng: Random) -> None:
    """Scores in the hundreds, where a softmax without its maximum overflows."""
    given = inputs.cls_cross_attention(rng, 3, 50, 96, 3)
    given["q_weight"] *= 40
    check(cls_cross_attention, given, precision, backend, zero=ZERO)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_views(backend: str, precision: Precision, layout: str, rng: Random) -> None:
    given = inputs.cls_cross_attention(rng, 3, 20, 96, 3)
    given["patches"] = inputs.arrange(given["patches"], layout)
    given["cls"] = inputs.arrange(given["cls"], "every other element")
    for name in ("q_weight", "k_weight", "v_weight"):
        given[name] = given[name].t().contiguous().t()
    given["norm_weight"] = inputs.arrange(given["norm_weight"], "every other element")
    check(cls_cross_attention, given | {"eps": 1e-3}, precision, backend, zero=ZERO)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_cls_and_patches_of_one_tensor(backend: str, precision: Precision, rng: Random) -> None:
    """Both are views of the same tokens, (B, 1 + N, D), as a model holds them."""
    given = inputs.cls_cross_attention(rng, 3, 20, 96, 3)
    x = torch.cat([given.pop("cls")[:, None], given.pop("patches")], dim=1)

    def op(x: Tensor, **parameters: Tensor) -> Tensor:
        return cls_cross_attention(x[:, 0], x[:, 1:], **parameters)

    check(op, {"x": x} | given, precision, backend, zero=ZERO)


def test_the_reference_is_the_authors_module(rng: Random) -> None:
    """timm's CrossAttention (the authors' code) behind a LayerNorm, up to its output projection, same weights."""
    from timm.models.crossvit import CrossAttention

    given = inputs.cls_cross_attention(rng, 2, 9, 24, 3)
    module, norm = CrossAttention(24, num_heads=3, qkv_bias=True).eval(), nn.LayerNorm(24, eps=1e-6)
    module.proj = nn.Identity()
    state = {f"w{n}.{p}": given[f"{n}_{p}"] for n in "qkv" for p in ("weight", "bias")}
    module.load_state_dict(state)
    norm.load_state_dict({"weight": given["norm_weight"], "bias": given["norm_bias"]})
    expected = module(norm(torch.cat([given["cls"][:, None], given["patches"]], dim=1)))[:, 0]
    torch.testing.assert_close(cls_cross_attention(**given, kernels="reference"), expected)


@pytest.mark.parametrize("where", ["patches", "cls", "q_weight", "k_weight", "v_weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.one_in(2)
def test_nonfinite_values_come_out_where_the_reference_has_them(
    backend: str, precision: Precision, where: str, value: float, rng: Random
) -> None:
    given = inputs.cls_cross_attention(rng, 3, 20, 96, 3)
    given[where].view(-1)[70] = value
    kernel, reference = (
        evaluate(cls_cross_attention, given, precision, k, device=DEVICES[backend]) for k in (backend, "reference")
    )
    for result in (kernel, reference):
        del result["grad k_bias"]  # it no longer enters
    # An infinite v_weight meets one mean of the tokens here, all tokens there: one infinity, or several that make NaN.
    assert_same_nonfinite(kernel, reference, exact="" if where == "v_weight" else "out")


def test_an_infinite_key_bias_changes_nothing(backend: str, rng: Random) -> None:
    given = place(inputs.cls_cross_attention(rng, 3, 20, 96, 3), backend)
    finite = cls_cross_attention(**given, kernels=backend)
    given["k_bias"] = torch.full_like(given["k_bias"], torch.inf)
    assert torch.equal(cls_cross_attention(**given, kernels=backend), finite)


def test_gradcheck_of_the_reference(rng: Random) -> None:
    given = inputs.cls_cross_attention(rng, 2, 3, 4, 2)
    tensors = {n: v.double().requires_grad_() for n, v in given.items() if n != "num_heads"}

    def call(*values: Tensor) -> Tensor:
        return cls_cross_attention(**dict(zip(tensors, values)), num_heads=2, kernels="reference")

    torch.autograd.gradcheck(call, tuple(tensors.values()))
    torch.autograd.gradgradcheck(call, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("width, served_by", [(768, "cuda"), (780, "reference")])
def test_tokens_too_wide_for_the_cuda_kernels_go_to_the_reference(width: int, served_by: str, rng: Random) -> None:
    if not backends.available("cuda"):
        pytest.skip(backends.reason("cuda"))
    given = place(inputs.cls_cross_attention(rng, 2, 3, width, 12), "cuda")
    leaf = given["patches"].requires_grad_()
    results = [cls_cross_attention(**given, kernels=kernels) for kernels in ("cuda", "reference")]
    grads = [torch.autograd.grad(out.sum(), leaf)[0] for out in results]
    same = all(torch.equal(*pair) for pair in (results, grads))
    assert same == (served_by == "reference")
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
