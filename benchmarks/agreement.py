"""How far two results lie from one another."""

from torch import Tensor


def rms(tensor: Tensor) -> float:
    """The root mean square of its elements."""
    return tensor.square().mean().sqrt().item()
