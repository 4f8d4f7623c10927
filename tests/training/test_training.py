"""Training: the kernels' losses are the reference's, step after step."""

import functools

import pytest
import torch
import torch.nn.functional as F

import crossvit
from benchmarks.photographs import photographs
from weights import CPU_BACKENDS

STEPS, BATCH, SIZE = 20, 4, 120
KERNELS = [name for name in CPU_BACKENDS if name != "reference"]


@functools.cache
def losses(kernels: str, dtype: torch.dtype) -> torch.Tensor:
    """The loss of each of 20 steps of CrossViT-9 on crops of five photographs, told apart, with drop path, from one
    seed.
    """
    torch.manual_seed(0)
    model = crossvit.create_model(
        "crossvit_9_240", image_size=SIZE, num_classes=5, drop_path_rate=0.1, kernels=kernels
    ).train()
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=3e-4))
    images, labels = photographs(4 * BATCH, SIZE), torch.arange(4 * BATCH) % 5
    found = []
    for step in range(STEPS):
        batch = slice(step % 4 * BATCH, (step % 4 + 1) * BATCH)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = F.cross_entropy(model(images[batch]).float(), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


def test_reference_learns() -> None:
    """The loss falls well below that of guessing, so that the comparison below is one of a model that learns."""
    found = losses("reference", torch.float32)
    assert found[0] > 1.4
    assert found[-4:].mean() < 0.5 * found[:4].mean()


# float32: rounding alone, grown over 20 steps; bfloat16: eight units of its last place
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-5), (torch.bfloat16, 8 * 2**-8)], ids=str)
def test_losses_are_the_references(dtype: torch.dtype, tolerance: float, kernels: str) -> None:
    """Every step's loss agrees with the float32 reference's to the dtype's precision (bfloat16: autocast)."""
    expected, found = losses("reference", torch.float32), losses(kernels, dtype)
    assert ((found - expected).abs() / expected).max() < tolerance
