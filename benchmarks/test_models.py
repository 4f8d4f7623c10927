"""Whole models on every backend beside the reference, by pytest-benchmark: `pytest benchmarks --benchmark-only`.

Weights are timm's, images photographs; logits and a training step's gradients have agreed with the float32 reference's
before anything is timed.
"""

import pytest
import torch

from . import models
from .conftest import Timed
from .devices import PLACES
from .session import DTYPES

RUNS = [
    *((model, "inference", batch) for model in ("crossvit_9_240", "crossvit_15_dagger_240") for batch in (1, 8)),
    ("crossvit_9_240", "train", 8),
]


@pytest.mark.parametrize("place", PLACES, indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model, mode, batch", RUNS)
def test_model(model: str, mode: str, batch: int, dtype: str, place: tuple[str, str], timed: Timed) -> None:
    device, kernels = place
    cell = models.Cell(model, batch, DTYPES[dtype], torch.get_num_threads(), mode == "train", device)
    run = models.our_call(cell, kernels)
    models.check(cell, run)
    timed(run, f"{model}, {mode}, {dtype}, batch {batch}", model=model, mode=mode, dtype=dtype, batch=batch)
