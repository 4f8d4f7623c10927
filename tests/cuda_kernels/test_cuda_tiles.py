"""CUDA kernels that the ops' own tests do not reach: tiles for large inputs, on one emulated multiprocessor for small
ones; two groups of heads; rows too wide for registers; products in TF32."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import crossvit_kernels
import inputs
from benchmarks.inspect import cuda_plan
from crossvit_kernels import backends
from inputs import Random
from numerics import (
    AUTOCAST,
    AUTOCAST16,
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    Precision,
    assert_equal_to_reference,
    check,
    evaluate,
    exact,
    simulated,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(
        not backends.emulated() or not backends.available("cuda"), reason="the kernels are not emulated"
    ),
]

# The template arguments of a kernel for matrices and activations, by precision.
TYPES = {
    FLOAT32: "float, float",
    BFLOAT16: "bfloat16, bfloat16",
    FLOAT16: "float16, float16",
    AUTOCAST: "bfloat16, float",
    AUTOCAST16: "float16, float",
}
# What runs, in which precision, and parts of the names of kernels that it has to launch: a tile is rows of warps,
# columns of warps, and in each warp 16-row and 8-column matrices.
CASES: list[tuple[str, dict[str, Any], Precision, list[str]]] = [
    *(
        ("patch_embed", {"size": (48, 48), "embed": embed}, precision, [f"false, {tile}>, 64, {stages}, 1, false"])
        for embed, tile, stages in ((128, "4, 4, 2, 4", 3), (192, "4, 4, 2, 6", 3), (256, "4, 4, 2, 8", 2))
        for precision in (BFLOAT16, FLOAT16)
    ),
    *(
        ("patch_embed", {"size": (40, 44), "embed": embed}, precision, [f"false, {tile}>, 64, 2, {blocks}, true"])
        for embed, tile, blocks in ((192, "2, 4, 2, 6", 2), (256, "2, 4, 2, 8", 1), (384, "2, 8, 2, 6", 1))
        for precision in (BFLOAT16, FLOAT16)
    ),
    ("patch_embed", {"size": (48, 48), "embed": 192}, FLOAT32, ["false, 2, 4, 2, 6>, 32, 3, 1, false"]),
    ("patch_embed", {"size": (40, 44), "embed": 192}, FLOAT32, ["false, 2, 4, 2, 6>, 32, 3, 1, true"]),
    ("patch_embed", {"size": (40, 44), "embed": 128}, FLOAT32, ["false, 2, 4, 2, 4>, 32, 3, 1, true"]),
    ("patch_embed", {"size": (40, 44), "embed": 128}, FLOAT16, ["false, 2, 4, 2, 4>, 64, 2, 2, true"]),
    *(
        ("layer_norm_linear", {"shape": (260, 96), "out": 200}, precision, ["false, 2, 2, 4, 8>, 32, 3>>"])
        for precision in (BFLOAT16, FLOAT16)
    ),
    *(
        ("layer_norm_linear", {"shape": (128, 192), "out": 520}, precision, ["false, 2, 4, 4, 8>, 32, 3>>"])
        for precision in (BFLOAT16, FLOAT16)
    ),
    ("linear_residual", {"shape": (300, 96), "out": 136}, FLOAT16, ["false, 2, 2, 4, 8>, 32, 3, false"]),
    *(
        ("layer_norm_linear", {"shape": (9, 800), "out": 24}, precision, [f"streamed_kernel<{types}>"])
        for precision, types in TYPES.items()
    ),
    *(
        (
            "cls_cross_attention",
            {"shape": (1, 40, 144, 12), "bias": False},
            precision,
            [f"token_pass_kernel<{types}, false, 2>", f"token_gradient_kernel<{types}, false, 2>"],
        )
        for precision, types in TYPES.items()
    ),
]
# Of float32 inputs, with the names of kernels that multiply in TF32.
TF32: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "patch_embed",
        {"size": (48, 48), "embed": 192},
        ["patch_embed", "patch_weight_gradient", "patch_images_gradient"],
    ),
    (
        "patch_embed",
        {"size": (40, 44), "embed": 128},
        ["patch_embed", "patch_weight_gradient", "patch_images_gradient"],
    ),
    ("layer_norm_linear", {"shape": (20, 96), "out": 100}, ["fused", "linear", "weight_gradient"]),
    ("linear_residual", {"shape": (20, 96), "out": 100}, ["linear", "weight_gradient"]),
    ("linear_residual", {"shape": (270, 96), "out": 100}, ["linear", "weight_gradient"]),
    *(
        (
            "cls_cross_attention",
            {"shape": (2, 40, 12 * heads, heads), "bias": False},
            [
                *("cls_query", "token_pass", "cls_value", "value_gradient", "token_gradient"),
                *("query_gradient", "query_input_gradient", "projection_gradients"),
            ],
        )
        for heads in (6, 12)
    ),
    ("cls_fusion", {"shape": (2, 40, 48, 96, 6)}, ["fusion_query", "token_pass", "fusion_value", "fusion_revert"]),
]


@pytest.fixture
def tf32() -> Iterator[None]:
    """float32 products may be made in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def given(rng: Random, op: str, sizes: dict[str, Any]) -> dict[str, Any]:
    if op == "patch_embed":
        size = sizes["size"]
        return inputs.patch_embed(rng, 1, *size, patch=4, embed=sizes["embed"], image_size=48)
    return getattr(inputs, op)(rng, *sizes["shape"], **{n: v for n, v in sizes.items() if n != "shape"})


@pytest.mark.parametrize("op, sizes, precision, tiles", CASES, ids=str)
def test_kernels_for_other_inputs(
    op: str, sizes: dict[str, Any], precision: Precision, tiles: list[str], rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSVIT_KERNELS_EMULATE_MULTIPROCESSORS", "1")
    with cuda_plan.recording(run=True) as launches:
        check(getattr(crossvit_kernels, op), given(rng, op, sizes), precision, "cuda")
    names = {launch.name for launch in launches}
    for tile in tiles:
        assert any(tile in name for name in names), names


@pytest.mark.parametrize("op, sizes, multiplying", TF32, ids=str)
def test_products_in_tf32(op: str, sizes: dict[str, Any], multiplying: list[str], rng: Random, tf32: None) -> None:
    """Held to the rule for a dtype with TF32's 10 bits behind the point."""
    values, function, gradients = given(rng, op, sizes), getattr(crossvit_kernels, op), op != "cls_fusion"
    with cuda_plan.recording(run=True) as launches:
        kernel = evaluate(function, values, FLOAT32, "cuda", gradients=gradients)
    reference = simulated(function, values, FLOAT32, gradients=gradients)
    ref64 = exact(function, values, FLOAT32, gradients=gradients)
    assert_equal_to_reference(kernel, reference, ref64, 2.0**-10)
    names = {launch.name for launch in launches}
    for name in multiplying:
        assert any(re.search(rf"\b{name}_kernel<.*\btrue\b", launched) for launched in names), (name, names)
