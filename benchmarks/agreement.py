"""How far two results lie from one another, and how far an op's result may lie from the reference's."""

from collections.abc import Callable

import torch
from torch import Tensor

from .cases import Cell, results
from .session import DisagreementError

# An error's root mean square against float64 may be this many times the reference's own in the same dtype, plus as many
# units in the last place of the result's.
AGREEMENT = 4


def rms(tensor: Tensor) -> float:
    """The root mean square of its elements."""
    return tensor.square().mean().sqrt().item()


def check(
    cell: Cell,
    function: Callable[..., Tensor],
    tensors: dict[str, Tensor],
    reference: Callable[..., Tensor] | None = None,
) -> None:
    """DisagreementError where output or a gradient is further from float64 than AGREEMENT allows; `reference` is the
    cell's own where it is not given."""
    reference = reference or cell.reference()
    exact = results(cell, reference, {name: t.double() for name, t in tensors.items()})
    own = results(cell, reference, tensors)
    for name, found, same, true in zip(
        ["output", *cell.differentiable()], results(cell, function, tensors), own, exact
    ):
        if found.shape != true.shape:
            raise DisagreementError(f"{name} has shape {tuple(found.shape)}, the reference's {tuple(true.shape)}")
        error, allowed = rms(found.double() - true), AGREEMENT * rms(same.double() - true)
        allowed += AGREEMENT * torch.finfo(cell.dtype).eps * rms(true)
        if not error <= allowed:
            raise DisagreementError(f"{name} is {error:.2g} (rms) off the float64 reference, {allowed:.2g} is allowed")
