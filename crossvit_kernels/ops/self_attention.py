"""self_attention: every token's query over all tokens, for every head of a packed projection.

    [q ‖ k ‖ v] = qkv                                   qkv (B, N, 3 D), each part D = num_heads · d wide
    out_h = softmax(q_h k_hᵀ / sqrt(d)) v_h             out (B, N, D)

In q, k, v and out the heads stand side by side, as timm's Attention packs them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch.call import call, needs_reference
from ..dispatch.register import register
from ..dispatch.spec import Argument, OpSpec, Result, Shapes
from . import validate


def self_attention_reference(qkv: Tensor, num_heads: int) -> Tensor:
    """self_attention in plain PyTorch."""
    batch, tokens, width = qkv.shape
    q, k, v = qkv.reshape(batch, tokens, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)  # (B, H, N, d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width // 3)


def _check(qkv: Tensor, num_heads: int) -> None:
    validate.tensor("qkv", qkv, "(B, N, 3 D)")
    if qkv.shape[-1] % 3 or qkv.shape[-1] == 0:
        raise ValueError(f"qkv: expected three equal parts (B, N, 3 D), got shape {tuple(qkv.shape)}")
    validate.heads(num_heads, qkv.shape[-1] // 3, "qkv's D")


def _save(qkv: Tensor, num_heads: int) -> tuple[Tensor]:
    batch, tokens, width = qkv.shape
    q, k, _ = qkv.float().reshape(batch, tokens, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    return ((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).logsumexp(dim=-1),)


def _shapes(qkv: Tensor, num_heads: int) -> Shapes:
    _check(qkv, num_heads)
    return {"qkv": qkv.shape}


def _results(qkv: Tensor, num_heads: int) -> tuple[Result, ...]:
    batch, tokens, width = qkv.shape
    return ((batch, tokens, width // 3), qkv.dtype), ((batch, num_heads, tokens), torch.float32)


def _flops(backend: str, qkv: Tensor) -> int:
    batch, tokens, width = qkv.shape
    return 4 * batch * tokens * tokens * (width // 3)


def _backward_flops(backend: str, needs: dict[str, bool], qkv: Tensor) -> int:
    return 5 * _flops(backend, qkv) // 2  # the scores again, and the gradients of p, v, q and k


_op = register(
    OpSpec(
        "self_attention",
        [Argument("qkv", activation=True, matrix=True), Argument("num_heads", "int")],
        computes_in="qkv",
        reference=self_attention_reference,
        shapes=_shapes,
        results=_results,
        flops=_flops,
        backward_flops=_backward_flops,
        saved=("lse",),  # (B, H, N) float32: the logarithm of the sum of the scaled scores' exponentials
        save=_save,
        takes_out=True,
    )
)


def self_attention(qkv: Tensor, num_heads: int, *, kernels: str = "auto") -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v for every head.

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
    inputs = (qkv, num_heads)
    if needs_reference(_op, inputs, kernels):
        return self_attention_reference(*inputs)
    return call(_op, inputs, kernels)
