"""LayerNorm of the references, whose parameters may be float32 beside 16-bit activations."""

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension, in x's dtype; under a GPU's autocast in float32, as PyTorch's there.

    PyTorch's own takes float32 parameters beside 16-bit activations on a CPU, and computes in float32; in all other
    cases the two meet in float32 here.
    """
    device = x.device.type
    if weight.dtype is x.dtype or (weight.dtype is torch.float32 if device == "cpu" else _autocast(device)):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    bias = None if bias is None else bias.to(dtype)
    return F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), bias, eps).to(x.dtype)


def _autocast(device: str) -> bool:
    return device == "cuda" and torch.is_autocast_enabled(device)
