"""self_attention: softmax(q k^T / sqrt(d)) v for every head of a packed projection.

qkv (B, N, 3 D) = [q || k || v], each D = num_heads * d wide, heads side by side, as timm's Attention packs them -> out
(B, N, D)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch.register import Op
from . import _validate


def self_attention_reference(qkv: Tensor, num_heads: int) -> Tensor:
    """self_attention in plain PyTorch."""
    batch, tokens, width = qkv.shape
    q, k, v = qkv.reshape(batch, tokens, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)  # (B, H, N, d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width // 3)


def _check(qkv: Tensor, num_heads: int) -> None:
    _validate.tensor("qkv", qkv, "(B, N, 3 D)")
    if qkv.shape[-1] % 3 or qkv.shape[-1] == 0:
        raise ValueError(f"qkv: expected three equal parts (B, N, 3 D), got shape {tuple(qkv.shape)}")
    _validate.heads(num_heads, qkv.shape[-1] // 3, "qkv's D")


def _save(qkv: Tensor, num_heads: int) -> tuple[Tensor]:
    batch, tokens, width = qkv.shape
    q, k, _ = qkv.float().reshape(batch, tokens, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    return ((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).logsumexp(dim=-1),)


def _shapes(qkv: Tensor, num_heads: int) -> tuple[Any, ...]:
    _check(qkv, num_heads)
    return (qkv.shape,)


def _results(qkv: Tensor, num_heads: int) -> tuple[Any, ...]:
    batch, tokens, width = qkv.shape
    return ((batch, tokens, width // 3), qkv.dtype), ((batch, num_heads, tokens), torch.float32)


def _flops(backend: str, qkv: Tensor, num_heads: int) -> int:
    batch, tokens, width = qkv.shape
    return 4 * batch * tokens * tokens * (width // 3)


def _backward_flops(backend: str, needs: dict[str, bool], qkv: Tensor, num_heads: int) -> int:
    return 5 * _flops(backend, qkv, num_heads) // 2  # q k^T again, and the gradients of p, v, q and k


_op = Op(
    "self_attention",
    "Tensor qkv, int num_heads",
    reference=self_attention_reference,
    shapes=_shapes,
    results=_results,
    flops=_flops,
    backward_flops=_backward_flops,
    matrices=("qkv",),
    activations=("qkv",),
    saved=("lse",),  # (B, H, N) float32: log sum exp of the scaled scores
    save=_save,
    takes_out=True,
)


def self_attention(qkv: Tensor, num_heads: int, *, kernels: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(d)) v for every head.

    Args:
        qkv: (B, N, 3 D), floating point, any strides: queries, keys and values side by side, in each the heads side by
            side.
        num_heads: a divisor of D; d = D / num_heads.
        kernels: the backend, see `crossvit_kernels.backends`.

    Returns:
        (B, N, D), heads joined, in qkv's dtype; under autocast in autocast's.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value is wrong; RuntimeError: the backend
            asked for is not there.
    """
    _check(qkv, num_heads)
    if _op.needs_reference(kernels, qkv, qkv.dtype):
        return self_attention_reference(qkv, num_heads)
    return _op(qkv, num_heads, kernels=kernels)
