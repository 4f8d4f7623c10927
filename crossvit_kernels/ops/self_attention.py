"""self_attention: softmax(q k^T / sqrt(d)) v for every head of a packed projection.

    qkv (B, N, 3 D) = [q || k || v], each D = num_heads * d wide, heads side by side, as timm's Attention packs them -> out (B, N, D)
"""

import torch.nn.functional as F
from torch import Tensor


def self_attention_reference(qkv: Tensor, num_heads: int) -> Tensor:
    """self_attention in plain PyTorch."""
    batch, tokens, width = qkv.shape
    q, k, v = qkv.reshape(batch, tokens, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)  # (B, H, N, d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width // 3)


def self_attention(qkv: Tensor, num_heads: int, *, kernels: str = "auto") -> Tensor:
    return self_attention_reference(qkv, num_heads)
