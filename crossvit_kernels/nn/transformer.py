"""The pre-norm transformer block and its attention half."""

import torch
from torch import Tensor, nn

from .. import blocks
from ..blocks import Residual, drop_path_scale
from ..prepared import again
from ..watch import fuses, fuses_each
from .compositions import ATTENTION_HALF, HALVES
from .layers import Attention, LayerScale, Mlp
from .module import KernelModule, check_rates

# In a graph that torch.fx traces it stays a call, which looks at shapes when the graph runs.
torch.fx.wrap("drop_path_scale")


class AttentionBlock(KernelModule):
    """x + DropPath(LayerScale(Attention(LayerNorm(x)))), x (B, N, D) -> (B, N, D); parameters norm1, attn and, with
    `init_values`, ls1.gamma.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = False,
        *,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        kernels: str = "auto",
    ) -> None:
        super().__init__(kernels=kernels)
        check_rates(drop_path=drop_path)
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, num_heads, qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop, kernels=kernels)
        self.ls1 = LayerScale(dim, init_values) if init_values else None
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        fused = fuses(self, ATTENTION_HALF) and not self.attn.drops()
        return self._attention_half(x, self._residual(self.ls1) if fused else None, self.kernels)

    def _attention_half(self, x: Tensor, residual: Residual | None, kernels: str) -> Tensor:
        """By the ops, or without a `residual` by the modules."""
        out = blocks.attention_half(x, self.norm1, self.attn, residual, kernels)
        return self._add(x, self.attn(self.norm1(x)), self.ls1) if out is None else out

    def _residual(self, layer_scale: LayerScale | None) -> Residual:
        gamma = None if layer_scale is None else layer_scale.gamma
        return Residual(gamma, self.drop_path if self.training else 0.0)

    def _add(self, x: Tensor, update: Tensor, layer_scale: LayerScale | None) -> Tensor:
        if layer_scale is not None:
            update = layer_scale(update)
        if self.training and self.drop_path > 0:
            update = update * drop_path_scale(update, self.drop_path)
        return x + update


class Block(AttentionBlock):
    """A pre-norm transformer block, x (B, N, D) -> (B, N, D): the attention half, then x +
    DropPath(LayerScale(Mlp(LayerNorm(x)))).

    Parameters norm1, attn, norm2, mlp and, with `init_values`, ls1.gamma and ls2.gamma.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        *,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        kernels: str = "auto",
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            qkv_bias,
            proj_drop=proj_drop,
            attn_drop=attn_drop,
            init_values=init_values,
            drop_path=drop_path,
            eps=eps,
            kernels=kernels,
        )
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.ls2 = LayerScale(dim, init_values) if init_values else None

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        out: Tensor | None = again(self, HALVES, x)
        if out is not None:
            return out
        kernels = self.kernels
        attention, mlp = fuses_each(self, HALVES)
        first = self._residual(self.ls1) if attention and not self.attn.drops() else None
        second = self._residual(self.ls2) if mlp and not self.mlp.drops() else None
        out = blocks.transformer_block(x, self, first, second, kernels, (self, HALVES, HALVES))
        if out is not None:
            return out
        x = self._attention_half(x, first, kernels)
        out = blocks.mlp_half(x, self.norm2, self.mlp, second, kernels)
        return self._add(x, self.mlp(self.norm2(x)), self.ls2) if out is None else out
