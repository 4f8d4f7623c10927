"""The cross-attention of CrossViT: the CLS token queries patches."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import blocks
from ..blocks import Residual, drop_path_scale
from ..watch import fuses
from .compositions import CLASS_ATTENTION
from .module import KernelModule, check_heads, check_rates

# In a graph that torch.fx traces it stays a call, which looks at shapes when the graph runs.
torch.fx.wrap("drop_path_scale")


class CrossAttention(nn.Module):
    """Attention of the first token over all tokens, x (B, 1 + N, D) -> (B, 1, D), plain PyTorch; parameters wq, wk, wv
    and proj.

    `CrossAttentionBlock` applies the same weights through the fused op, which takes the LayerNorm in front of them too.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = False, *, attn_drop: float = 0.0, proj_drop: float = 0.0
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_rates(attn_drop=attn_drop, proj_drop=proj_drop)
        self.num_heads = num_heads
        self.wq, self.wk, self.wv = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = proj_drop

    def drops(self) -> bool:
        """Whether dropout is at work."""
        return self.training and (self.attn_drop > 0 or self.proj_drop > 0)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 1 + N, D), the CLS token first -> (B, 1, D)."""
        q, k, v = (
            y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (self.wq(x[:, :1]), self.wk(x), self.wv(x))
        )  # (B, H, 1 or 1 + N, d)
        dropout = self.attn_drop if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)
        return F.dropout(self.proj(out), self.proj_drop, self.training)


class CrossAttentionBlock(KernelModule):
    """CLS + DropPath(CrossAttention(LayerNorm([CLS || patches]))), arXiv 2103.14899, eq. 6; parameters norm1 and attn.

    forward(x) takes the tokens as timm's module does, (B, 1 + N, D) with the CLS first, and returns (B, 1, D);
    forward(cls, patches) takes them apart, (B, D) and (B, N, D), without a concatenation, and returns (B, D).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        kernels: str = "auto",
    ) -> None:
        super().__init__(kernels=kernels)
        check_rates(drop_path=drop_path)
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = CrossAttention(dim, num_heads, qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop)
        self.drop_path = drop_path

    def forward(self, x: Tensor, patches: Tensor | None = None) -> Tensor:
        """x (B, 1 + N, D) -> (B, 1, D); or x, the CLS tokens (B, D), and patches (B, N, D) -> (B, D)."""
        if patches is None:
            return self._attend(x[:, 0], x[:, 1:])[:, None]
        return self._attend(x, patches)

    def linears(self) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        """The projections of queries, keys and values, and the one behind the attention."""
        attn = self.attn
        return attn.wq, attn.wk, attn.wv, attn.proj

    def _attend(self, cls: Tensor, patches: Tensor) -> Tensor:
        rate = self.drop_path if self.training else 0.0
        if fuses(self, CLASS_ATTENTION) and not self.attn.drops():
            heads = self.attn.num_heads
            residual = Residual(None, rate)
            out = blocks.class_attention(cls, patches, self.norm1, self.linears(), heads, residual, self.kernels)
            if out is not None:
                return out
        update = self.attn(self.norm1(torch.cat((cls[:, None], patches), dim=1)))[:, 0]
        return cls + (update * drop_path_scale(update, rate) if rate > 0 else update)
