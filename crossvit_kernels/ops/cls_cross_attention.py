"""cls_cross_attention: one query, from the CLS token, over the CLS token and the patches (of CrossViT's other branch).

    x   = LayerNorm([cls || patches])                             cls (B, D), patches (B, N, D)
    q_h = W_q,h x_0 + b_q,h ;  k_hn = W_k,h x_n + b_k,h ;  v_hn = W_v,h x_n + b_v,h
    out = [softmax_n(q_h . k_hn / sqrt(d)) v_hn  for every head h]                       (B, D), D = num_heads * d

arXiv 2103.14899, eq. 6; `CrossAttention` in the authors' models/crossvit.py. The kernels never form keys or values (the absorbed form):
with x^ the normalised token without its affine part gamma, beta

    u_h   = gamma o (W_k,h^T q_h) / sqrt(d)        p_h = softmax_n(u_h . x^_n)          b_k and beta add the same to every score: they drop out
    z_h   = sum_n p_hn x^_n                        out_h = W_v,h (gamma o z_h + beta) + b_v,h
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    x = F.layer_norm(torch.cat([cls[:, None], patches], dim=1), norm_weight.shape, norm_weight, norm_bias, eps)
    q, k, v = F.linear(x[:, :1], q_weight, q_bias), F.linear(x, k_weight, k_bias), F.linear(x, v_weight, v_bias)
    head_dim = cls.shape[1] // num_heads
    q, k, v = (t.unflatten(-1, (num_heads, head_dim)).transpose(1, 2) for t in (q, k, v))  # (B, H, 1 or 1 + N, d)
    probs = (q * head_dim**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, H, 1, 1 + N)
    return (probs @ v).transpose(1, 2).flatten(1)


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
    return cls_cross_attention_reference(
        cls, patches, norm_weight, norm_bias, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, num_heads, eps
    )
