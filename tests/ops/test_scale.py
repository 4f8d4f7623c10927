"""What the factor of linear_residual and layer_norm_mlp means, per sample or per channel, is decided once: it does not
depend on how many dimensions x has, nor on the backend."""

from typing import Any

import pytest
import torch
from torch import Tensor

import crossvit_kernels
import inputs
from inputs import Random
from numerics import DEVICES

# The sizes of x and of the result; in a square one a factor per sample could be taken for one per channel.
WIDTHS = [(17, 17), (17, 19), (1, 1), (3, 2)]
LEADING = {1: (), 2: (3,), 3: (17, 3), 4: (2, 3, 2), 5: (2, 1, 3, 2)}


def results(op: str, given: dict[str, Any], kernels: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output and every gradient, in float64."""
    device = DEVICES.get(kernels, "cpu")
    leaves = {n: v.to(device, dtype).requires_grad_() if isinstance(v, Tensor) else v for n, v in given.items()}
    out = getattr(crossvit_kernels, op)(**leaves, kernels=kernels)
    out.backward(Random(1).normal(*out.shape).to(out))
    found = {"out": out, **{n: v.grad for n, v in leaves.items() if isinstance(v, Tensor)}}
    return {n: v.detach().double().cpu() for n, v in found.items()}


def made(op: str, rank: int, widths: tuple[int, int], kind: str | None) -> dict[str, Any]:
    width, out = widths
    if op == "linear_residual":
        return inputs.linear_residual(Random(), *LEADING[rank], width, out=out, scale=kind)
    return inputs.layer_norm_mlp(Random(), *LEADING[rank], width, hidden=out, scale=kind)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("op", ["linear_residual", "layer_norm_mlp"])
def test_every_rank_and_kind(backend: str, op: str, widths: tuple[int, int]) -> None:
    """Forward and all gradients, the factor's own among them, as the reference in float64 has them."""
    for rank in LEADING:
        for kind in (None, "channel", *(["sample"] if rank > 1 else [])):
            given = made(op, rank, widths, kind)
            expected = results(op, given, "reference", torch.float64)
            for name, found in results(op, given, backend, torch.float32).items():
                case = f"{name} of rank {rank}, {kind}"
                torch.testing.assert_close(
                    found, expected[name], rtol=1e-3, atol=1e-3, msg=lambda m, c=case: f"{c}: {m}"
                )


@pytest.mark.parametrize("op", ["linear_residual", "layer_norm_mlp"])
def test_of_one_row_it_is_per_channel(backend: str, op: str) -> None:
    """One row alone is what it is as the first of two: its factor of one dimension has no samples to be for."""
    given = made(op, 1, (17, 17), "channel")
    rows = {"x", "residual"} & given.keys()
    twice = given | {name: torch.stack([given[name]] * 2) for name in rows}
    device = DEVICES[backend]
    one, two = (
        getattr(crossvit_kernels, op)(
            **{n: v.to(device) if isinstance(v, Tensor) else v for n, v in g.items()}, kernels=backend
        )
        for g in (given, twice)
    )
    torch.testing.assert_close(one, two[0])
    with pytest.raises(ValueError, match=r"scale: expected shape \(17,\), got \(1,\)"):
        getattr(crossvit_kernels, op)(**given | {"scale": torch.ones(1)}, kernels="reference")


@pytest.mark.parametrize("kind", ["channel", "sample"])
def test_the_dispatcher_op_takes_it_as_it_is(backend: str, kind: str) -> None:
    """What an exported program calls."""
    rank = 1 if kind == "channel" else 2
    given = {n: v.to(DEVICES[backend]) for n, v in made("linear_residual", rank, (17, 17), kind).items()}
    op = torch.ops.crossvit_kernels.linear_residual
    found, expected = (
        op(*(given[n] for n in ("x", "weight", "bias", "residual", "scale")), kind == "sample", False, kernels)
        for kernels in (backend, "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
