"""Every instruction set that was compiled in and that this CPU has obeys the rule of numerics.py, not just the best."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

import available
import crossvit_kernels
import inputs
from crossvit_kernels import backends
from inputs import Random
from numerics import BFLOAT16, FLOAT32, Precision, check

if not backends.available("cpu"):
    pytest.skip(str(backends.reason("cpu")), allow_module_level=True)

# One shape that no vector, tile or panel divides, and that of a branch.
CASES = {
    "layer_norm_linear": lambda rng: inputs.layer_norm_linear(rng, 3, 37, 100, out=75) | {"activation": "gelu"},
    "layer_norm_linear projection": lambda rng: (
        inputs.layer_norm_linear(rng, 5, 96, out=192) | {"pre_activation": "gelu"}
    ),
    "linear_residual": lambda rng: inputs.linear_residual(rng, 3, 37, 100, out=75, scale="sample"),
    "layer_norm_mlp": lambda rng: inputs.layer_norm_mlp(rng, 3, 37, 100, hidden=150, scale="channel"),
    "self_attention": lambda rng: inputs.self_attention(rng, 2, 57, 100, 5),
    "self_attention branch": lambda rng: inputs.self_attention(rng, 1, 197, 192, 3),
    "bicubic_resize": lambda rng: inputs.bicubic_resize(rng, 2, 50, 61, (42, 57)),
    "bicubic_resize far taps": lambda rng: inputs.bicubic_resize(rng, 1, 50, 61, (60, 13)),
    "patch_embed": lambda rng: inputs.patch_embed(rng, 2, 50, 61, patch=6, embed=37, image_size=(42, 54)),
    "cls_cross_attention": lambda rng: inputs.cls_cross_attention(rng, 3, 57, 100, 5),
    "cls_cross_attention branch": lambda rng: inputs.cls_cross_attention(rng, 2, 196, 192, 6),
    "cls_fusion": lambda rng: inputs.cls_fusion(rng, 3, 57, 37, 100, 5),
}


@pytest.fixture(params=available.built_instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each in turn, and afterwards the one that was in force."""
    with ExitStack() as stack:
        try:
            stack.enter_context(available.instruction_set(request.param))
        except available.FROM_CPP as error:
            pytest.skip(str(error))
        yield request.param


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_rule(instruction_set: str, case: str, precision: Precision, rng: Random) -> None:
    assert torch.ops.crossvit_kernels_cpu.instruction_set() == instruction_set
    name = case.partition(" ")[0]
    assert backends.serves("cpu", name)
    given: dict[str, Any] = CASES[case](rng)
    zero = {"grad k_bias": 0.0} if name == "cls_cross_attention" else None  # by mathematics; the kernels return zeros
    check(getattr(crossvit_kernels, name), given, precision, "cpu", gradients=name != "cls_fusion", zero=zero)


def test_one_that_was_not_built_is_named() -> None:
    with pytest.raises(available.FROM_CPP, match=r"'sse9' was not compiled in.*generic"):
        torch.ops.crossvit_kernels_cpu.set_instruction_set("sse9")
