"""Every op on every backend beside its reference, by pytest-benchmark: `pytest benchmarks --benchmark-only`.

A group of the table is one op, direction, dtype and shape; its rows are the backends. Each has agreed with the float64
reference before it is timed. Inputs stay in the caches: `python -m benchmarks.ops` times with inputs that do not.
"""

import pytest
import torch

from .agreement import check
from .cases import BRANCHES, INFERENCE_ONLY, OPS, Cell, call, inputs, output_gradient, usual_batch
from .conftest import Timed
from .devices import PLACES
from .session import DTYPES

DIRECTIONS = [
    (op, direction) for op in OPS for direction in ("forward", "forward+backward")[: 1 + (op not in INFERENCE_ONLY)]
]


@pytest.mark.parametrize("place", PLACES, indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("op, direction", DIRECTIONS)
def test_op(op: str, direction: str, branch: str, dtype: str, place: tuple[str, str], timed: Timed) -> None:
    device, kernels = place
    backward = direction == "forward+backward"
    cell = Cell(op, branch, usual_batch(op), DTYPES[dtype], backward, torch.get_num_threads(), device)
    function, tensors = cell.function(kernels), inputs(cell, 0)
    check(cell, function, tensors)
    run = call(cell, function, [tensors], output_gradient(cell, function, tensors))
    shape = f"{cell.batch} × {cell.sizes.tokens} × {cell.sizes.width}"
    timed(run, f"{op}, {direction}, {dtype}, {shape}", op=op, direction=direction, dtype=dtype, shape=shape)
