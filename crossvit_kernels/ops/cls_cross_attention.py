"""cls_cross_attention: one query, from the CLS token, over the CLS token and the patches (of CrossViT's other branch).

    x     = LayerNorm([cls ‖ patches])                   cls (B, D), patches (B, N, D)
    q_h   = W_q,h x_0 + b_q,h                            D = num_heads · d
    k_hn  = W_k,h x_n + b_k,h
    v_hn  = W_v,h x_n + b_v,h
    out_h = Σ_n softmax_n(q_h · k_hn / sqrt(d)) v_hn     out (B, D), the heads side by side

This is equation 6 of arXiv 2103.14899 and `CrossAttention` in the authors' models/crossvit.py. The kernels never form
keys or values (the absorbed form). With x̂ the normalised token without its affine part γ, β (norm_weight, norm_bias):

    a_h   = W_k,hᵀ q_h / sqrt(d)
    u_h   = γ ∘ a_h
    p_hn  = softmax_n(u_h · x̂_n)
    z_h   = Σ_n p_hn x̂_n
    out_h = W_v,h (γ ∘ z_h + β) + b_v,h

b_k and β would add the same number to every score of a head, so the softmax does not see them.
docs/design/cls_cross_attention.md has the steps and the backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch.call import call, needs_reference
from ..dispatch.register import register
from ..dispatch.spec import Argument, LinearParams, NormParams, OpSpec, Result, Shapes
from . import validate
from .layer_norm import layer_norm


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
    cls: Tensor,
    patches: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, ...]:
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
        u = key_query * norm_weight.float()
        probs = (u @ normalized.transpose(1, 2)).softmax(dim=-1)
        context = probs @ normalized
        return mean, rstd, probs, context, query, key_query.contiguous()


_NORM = NormParams.named("norm")
_QUERY, _KEY, _VALUE = map(LinearParams.named, ("q", "k", "v"))
PARAMETERS = (_NORM, _QUERY, _KEY, _VALUE)


def parameter_shapes(width: int) -> Shapes:
    """The shapes of the attention's parameters."""
    return {
        **_NORM.shapes(width),
        **_QUERY.shapes(width, width),
        **_KEY.shapes(width, width),
        **_VALUE.shapes(width, width),
    }


def _shapes(patches: Tensor, num_heads: int) -> Shapes:
    validate.tensor("patches", patches, "(B, N, D)")
    batch, _, width = patches.shape
    validate.heads(num_heads, width, "the width")
    return {"cls": (batch, width), "patches": patches.shape, **parameter_shapes(width)}


def _results(cls: Tensor, patches: Tensor, q_weight: Tensor, num_heads: int) -> tuple[Result, ...]:
    (batch, width), tokens = cls.shape, 1 + patches.shape[1]
    statistics, per_head = (batch, tokens), (batch, num_heads, width)
    shapes = (statistics, statistics, (batch, num_heads, tokens), per_head, (batch, width), per_head)
    return ((batch, width), q_weight.dtype), *((shape, torch.float32) for shape in shapes)


def flops(backend: str, patches: Tensor, num_heads: int) -> int:
    """The floating-point operations of the forward."""
    (batch, _, width), tokens = patches.shape, 1 + patches.shape[1]
    if backend == "reference":
        return 2 * batch * width * (width + 2 * tokens * width + 2 * tokens)
    return 2 * batch * width * (3 * width + 2 * tokens * num_heads)


def _backward_flops(backend: str, needs: dict[str, bool], patches: Tensor, num_heads: int) -> int:
    if backend == "reference":
        return 2 * flops(backend, patches, num_heads)
    (batch, _, width), tokens = patches.shape, 1 + patches.shape[1]
    inside = needs["cls"] or needs["patches"] or needs["norm_weight"] or needs["norm_bias"]
    scores = inside or needs["q_weight"] or needs["q_bias"] or needs["k_weight"]
    query = inside or needs["q_weight"] or needs["q_bias"]
    projections = scores + query + inside + needs["q_weight"] + needs["k_weight"] + needs["v_weight"]
    passes = 2 * scores + 2 * inside  # the gradients of p_h and of u_h; the two terms of x̂_n's gradient
    return 2 * batch * width * (projections * width + passes * tokens * num_heads)


# The CUDA kernels hold sixteen tokens of a row tile and the rows beside them in shared memory: 768 floats wide.
CUDA_ROW_BYTES = 3072


def fits_cuda(cls: Tensor, patches: Tensor, q_weight: Tensor) -> bool:
    """Whether the rows of both fit."""
    if patches.dim() != 3 or cls.dim() != 2:
        return True  # the kernels refuse it in words
    size = max(cls.element_size(), patches.element_size(), q_weight.element_size())
    return max(cls.shape[1], patches.shape[2]) * size <= CUDA_ROW_BYTES


_op = register(
    OpSpec(
        "cls_cross_attention",
        [
            Argument("cls", activation=True, promoted=True),
            Argument("patches", activation=True, promoted=True),
            *PARAMETERS,
            Argument("num_heads", "int"),
            Argument("eps", "float"),
        ],
        computes_in="q_weight",
        reference=cls_cross_attention_reference,
        shapes=_shapes,
        results=_results,
        flops=flops,
        backward_flops=_backward_flops,
        # All float32: mean, rstd (B, 1 + N); p_h (B, H, 1 + N); z_h (B, H, D); q (B, D), unscaled; a_h (B, H, D).
        saved=("mean", "rstd", "probs", "context", "query", "key_query"),
        save=_save,
        fits={"cuda": fits_cuda},
    )
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
    """Attention of the CLS token's query over LayerNorm([cls ‖ patches]), before the output projection.

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
    validate.tensor("patches", patches, "(B, N, D)")
    batch, _, width = patches.shape
    validate.positive("patches' width", width)
    validate.beside("cls", cls, (batch, width), "patches", patches, any_dtype=True)
    if cls.dtype is not patches.dtype:
        dtype = torch.promote_types(cls.dtype, patches.dtype)  # as in torch.cat
        cls, patches = cls.to(dtype), patches.to(dtype)
    square = (width, width)
    validate.norm("norm_weight", norm_weight, "norm_bias", norm_bias, (width,), "patches", patches)
    validate.linear("q_weight", q_weight, "q_bias", q_bias, square, "patches", patches)
    validate.linear("k_weight", k_weight, "k_bias", k_bias, square, "patches", patches)
    validate.linear("v_weight", v_weight, "v_bias", v_bias, square, "patches", patches)
    validate.heads(num_heads, width, "the width")
    validate.epsilon(eps)
    projections = q_weight, q_bias, k_weight, k_bias, v_weight, v_bias
    inputs = (cls, patches, norm_weight, norm_bias, *projections, num_heads, eps)
    if needs_reference(_op, inputs, kernels):
        return cls_cross_attention_reference(*inputs)
    return call(_op, inputs, kernels)
