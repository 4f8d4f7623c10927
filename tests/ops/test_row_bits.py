"""A row's result does not depend on the rows beside it: a batch of one and of many agree to the bit."""

from typing import Any

import pytest
import torch

import crossvit_kernels
import inputs
from available import NATIVE
from inputs import Random

ROWS, WIDTH, OUT = 100, 96, 72
GIVEN: dict[str, dict[str, Any]] = {
    "layer_norm_linear": dict(out=OUT),
    "linear_residual": dict(out=OUT),
    "layer_norm_mlp": dict(hidden=200),
}


@pytest.mark.skipif("cpu" not in NATIVE, reason="the C++ kernels are not there")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GIVEN)
def test_the_bits_of_a_row_do_not_depend_on_the_rows_beside_it(name: str, dtype: torch.dtype) -> None:
    """However many are left for the last panel: whole vectors, half ones, or columns divided over the threads."""
    made = getattr(inputs, name)(Random(0), ROWS, WIDTH, **GIVEN[name])
    given = {key: v.to(dtype) if isinstance(v, torch.Tensor) else v for key, v in made.items()}
    op, by_rows = getattr(crossvit_kernels, name), [key for key in ("x", "residual") if key in given]
    whole, before = op(**given, kernels="cpu"), torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for count in range(1, ROWS):
                few = op(**given | {key: given[key][:count] for key in by_rows}, kernels="cpu")
                assert torch.equal(few, whole[:count]), (threads, count)
    finally:
        torch.set_num_threads(before)
