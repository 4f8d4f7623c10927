"""cls_cross_attention: one query, from the CLS token, over the CLS token and the patches (of CrossViT's other branch).

    x   = LayerNorm([cls || patches])                             cls (B, D), patches (B, N, D)
    q_h = W_q,h x_0 + b_q,h ;  k_hn = W_k,h x_n + b_k,h ;  v_hn = W_v,h x_n + b_v,h
    out = [softmax_n(q_h . k_hn / sqrt(d)) v_hn  for every head h]                       (B, D), D = num_heads * d

arXiv 2103.14899, eq. 6; `CrossAttention` in the authors' models/crossvit.py. The kernels never form keys or values (the
absorbed form): with x^ the normalised token without its affine part gamma, beta

    u_h   = gamma o (W_k,h^T q_h) / sqrt(d)        p_h = softmax_n(u_h . x^_n)          b_k and beta add the same to
    every score: they drop out z_h   = sum_n p_hn x^_n                        out_h = W_v,h (gamma o z_h + beta) + b_v,h
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch.register import Op
from . import _validate
from ._layer_norm import layer_norm


def cls_cross_attention_reference(
    cls: Tensor,
    patches: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    num_heads: int,
    eps: float = 1e-6,
) -> Tensor:
    """cls_cross_attention in plain PyTorch."""
    x = layer_norm(torch.cat([cls[:, None], patches], dim=1), norm_weight, norm_bias, eps)
    q, k, v = F.linear(x[:, :1], q_weight, q_bias), F.linear(x, k_weight, k_bias), F.linear(x, v_weight, v_bias)
    head_dim = cls.shape[1] // num_heads
    q, k, v = (t.unflatten(-1, (num_heads, head_dim)).transpose(1, 2) for t in (q, k, v))  # (B, H, 1 or 1 + N, d)
    probs = (q * head_dim**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, H, 1, 1 + N)
    return (probs @ v).transpose(1, 2).flatten(1)


def _save(
    cls: Tensor, patches: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    q_weight, q_bias, k_weight, _, _, _, num_heads, eps = rest
    with torch.autocast(cls.device.type, enabled=False):  # all of it is float32
        x = torch.cat([cls[:, None], patches], dim=1).float()
        variance, mean = torch.var_mean(x, dim=-1, correction=0)
        rstd = (variance + eps).rsqrt()
        normalized = (x - mean[..., None]) * rstd[..., None]
        first = F.layer_norm(
            cls.float(), norm_weight.shape, norm_weight.float(), None if norm_bias is None else norm_bias.float(), eps
        )
        query = F.linear(first, q_weight.float(), None if q_bias is None else q_bias.float())
        heads, head_dim = query.unflatten(-1, (num_heads, -1)), cls.shape[1] // num_heads
        key_query = torch.einsum("bhd,hdc->bhc", heads, k_weight.float().unflatten(0, (num_heads, -1))) * head_dim**-0.5
        probs = (key_query * norm_weight.float() @ normalized.transpose(1, 2)).softmax(dim=-1)
        return mean, rstd, probs, probs @ normalized, query, key_query.contiguous()


def _shapes(cls: Tensor, patches: Tensor, *rest: Any) -> tuple[Any, ...]:
    _validate.tensor("patches", patches, "(B, N, D)")
    batch, _, width = patches.shape
    _validate.heads(rest[-2], width, "the width")
    vector, square = (width,), (width, width)
    return (batch, width), patches.shape, vector, vector, square, vector, square, vector, square, vector


def _results(cls: Tensor, patches: Tensor, *rest: Any) -> tuple[Any, ...]:
    (batch, width), tokens, q_weight, num_heads = cls.shape, 1 + patches.shape[1], rest[2], rest[-2]
    statistics, per_head = (batch, tokens), (batch, num_heads, width)
    shapes = (statistics, statistics, (batch, num_heads, tokens), per_head, (batch, width), per_head)
    return ((batch, width), q_weight.dtype), *((shape, torch.float32) for shape in shapes)


def _flops(backend: str, cls: Tensor, patches: Tensor, *rest: Any) -> int:
    (batch, width), tokens, num_heads = cls.shape, 1 + patches.shape[1], rest[-2]
    if backend == "reference":
        return 2 * batch * width * (width + 2 * tokens * width + 2 * tokens)
    return 2 * batch * width * (3 * width + 2 * tokens * num_heads)


def _backward_flops(backend: str, needs: dict[str, bool], cls: Tensor, patches: Tensor, *rest: Any) -> int:
    if backend == "reference":
        return 2 * _flops(backend, cls, patches, *rest)
    (batch, width), tokens, num_heads = cls.shape, 1 + patches.shape[1], rest[-2]
    inside = needs["cls"] or needs["patches"] or needs["norm_weight"] or needs["norm_bias"]
    scores = inside or needs["q_weight"] or needs["q_bias"] or needs["k_weight"]
    query = inside or needs["q_weight"] or needs["q_bias"]
    projections = scores + query + inside + needs["q_weight"] + needs["k_weight"] + needs["v_weight"]
    passes = 2 * scores + 2 * inside  # p's gradient and sum_n ds_n x^_n; x^'s two terms
    return 2 * batch * width * (projections * width + passes * tokens * num_heads)


# The CUDA kernels hold sixteen tokens of a row tile and the rows beside them in shared memory: 768 floats wide.
CUDA_ROW_BYTES = 3072


def _fits_cuda(cls: Tensor, patches: Tensor, *rest: Any) -> bool:
    if patches.dim() != 3:
        return True  # they say so
    return patches.shape[2] * max(cls.element_size(), patches.element_size(), rest[2].element_size()) <= CUDA_ROW_BYTES


_op = Op(
    "cls_cross_attention",
    "Tensor cls, Tensor patches, Tensor norm_weight, Tensor? norm_bias, Tensor q_weight, Tensor? q_bias, "
    "Tensor k_weight, Tensor? k_bias, Tensor v_weight, Tensor? v_bias, int num_heads, float eps",
    reference=cls_cross_attention_reference,
    shapes=_shapes,
    results=_results,
    flops=_flops,
    backward_flops=_backward_flops,
    matrices=("q_weight", "q_bias", "k_weight", "k_bias", "v_weight", "v_bias"),
    activations=("cls", "patches"),
    promoted=("cls", "patches"),
    # All float32: mean, rstd (B, 1 + N); p (B, H, 1 + N); z (B, H, D); q (B, D), unscaled; u without gamma (B, H, D)
    saved=("mean", "rstd", "probs", "context", "query", "key_query"),
    save=_save,
    fits={"cuda": _fits_cuda},
)


def cls_cross_attention(
    cls: Tensor,
    patches: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    num_heads: int,
    eps: float = 1e-6,
    *,
    kernels: str = "auto",
) -> Tensor:
    """Attention of the CLS token's query over LayerNorm([cls || patches]), before the output projection.

    Args:
        cls, patches: (B, D) and (B, N, D), floating point, any strides; of two dtypes they meet in the one to which
            these promote, which is then what the other arguments have.
        norm_weight, norm_bias: (D,), as nn.LayerNorm holds them, in the tokens' dtype or float32; the bias may be
            None.
        q_weight, k_weight, v_weight, q_bias, k_bias, v_bias: (D, D) and (D,), as nn.Linear holds them; any bias may be
            None. By mathematics k_bias changes nothing and its gradient is zero; the kernels do not read it and return
            zeros.
        num_heads: a divisor of D.
        eps: added to LayerNorm's variance.
        kernels: the backend, see `crossvit_kernels.backends`; "cuda" is served by the reference for tokens of more than
            CUDA_ROW_BYTES.

    Returns:
        (B, D), heads joined, in the inputs' dtype; under autocast in autocast's.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value is wrong; RuntimeError: the backend
            asked for is not there.
    """
    _validate.tensor("patches", patches, "(B, N, D)")
    batch, _, width = patches.shape
    _validate.positive("patches' width", width)
    _validate.beside("cls", cls, (batch, width), "patches", patches, any_dtype=True)
    if cls.dtype is not patches.dtype:
        dtype = torch.promote_types(cls.dtype, patches.dtype)  # as in torch.cat
        cls, patches = cls.to(dtype), patches.to(dtype)
    vector, square = (width,), (width, width)
    _validate.norm("norm_weight", norm_weight, "norm_bias", norm_bias, vector, "patches", patches)
    _validate.beside("q_weight", q_weight, square, "patches", patches)
    if q_bias is not None:
        _validate.beside("q_bias", q_bias, vector, "patches", patches)
    _validate.beside("k_weight", k_weight, square, "patches", patches)
    if k_bias is not None:
        _validate.beside("k_bias", k_bias, vector, "patches", patches)
    _validate.beside("v_weight", v_weight, square, "patches", patches)
    if v_bias is not None:
        _validate.beside("v_bias", v_bias, vector, "patches", patches)
    _validate.heads(num_heads, width, "the width")
    _validate.epsilon(eps)
    inputs = (
        cls,
        patches,
        norm_weight,
        norm_bias,
        q_weight,
        q_bias,
        k_weight,
        k_bias,
        v_weight,
        v_bias,
        num_heads,
        eps,
    )
    if _op.needs_reference(kernels, patches, q_weight.dtype):
        return cls_cross_attention_reference(*inputs)
    return _op(*inputs, kernels=kernels)
