"""LayerNorm of the references, whose parameters may be float32 beside 16-bit activations."""

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension, in x's dtype; under autocast in what PyTorch's is there.

    PyTorch's own takes float32 parameters beside 16-bit activations on a CPU, and computes in float32; elsewhere they
    meet in float32 here.
    """
    if weight.dtype is x.dtype or torch.is_autocast_enabled(x.device.type):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    if x.device.type == "cpu" and weight.dtype is torch.float32:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    bias = None if bias is None else bias.to(dtype)
    return F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), bias, eps).to(x.dtype)
