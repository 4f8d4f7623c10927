"""The layers of a transformer block: LayerNorm and Linear, self-attention, MLP, LayerScale."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import blocks
from ..composition import Composition
from ..kinds import plain
from ..ops import self_attention
from ..watch import fuses
from .compositions import PROJECTIONS
from .module import KernelModule, check_heads, check_rates


class LayerNormLinear(KernelModule, nn.Sequential):
    """`nn.Sequential(LayerNorm, [GELU], Linear, [GELU])` in one op, under the Sequential's own keys: x (..., in) ->
    (..., out).

    `pre_activation="gelu"` puts a GELU before the Linear, `activation="gelu"` one behind it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        eps: float = 1e-6,
        *,
        pre_activation: str | None = None,
        activation: str | None = None,
        kernels: str = "auto",
    ) -> None:
        super().__init__(kernels=kernels)
        for name, value in ("pre_activation", pre_activation), ("activation", activation):
            if value not in (None, "gelu"):
                raise ValueError(f"{name} must be None or 'gelu', got {value!r}")
        self.pre_activation, self.activation = pre_activation, activation
        self.append(nn.LayerNorm(in_features, eps))
        if pre_activation:
            self.append(nn.GELU())
        self.append(nn.Linear(in_features, out_features, bias))
        if activation:
            self.append(nn.GELU())

    @property
    def norm(self) -> nn.LayerNorm:
        """The LayerNorm, child 0."""
        return cast(nn.LayerNorm, self._modules["0"])

    @property
    def linear(self) -> nn.Linear:
        """The Linear."""
        return cast(nn.Linear, self._modules["2" if self.pre_activation else "1"])

    def composition(self) -> Composition:
        """The children that the op stands for."""
        return PROJECTIONS[self.pre_activation, self.activation]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features), in x's dtype."""
        composition = self.composition()
        if len(self._modules) == len(composition.parts) and fuses(self, composition):
            activations = {"pre_activation": self.pre_activation, "activation": self.activation}
            out = blocks.projection(x, self.norm, self.linear, self.kernels, **activations)
            if out is not None:
                return out
        return nn.Sequential.forward(self, x)


class Attention(KernelModule):
    """Multi-head self-attention, x (B, N, D) -> (B, N, D); parameters qkv and proj."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        *,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        kernels: str = "auto",
    ) -> None:
        super().__init__(kernels=kernels)
        check_heads(dim, num_heads)
        check_rates(attn_drop=attn_drop, proj_drop=proj_drop)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = proj_drop

    def drops(self) -> bool:
        """Whether dropout is at work."""
        return self.training and (self.attn_drop > 0 or self.proj_drop > 0)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        qkv = self.qkv(x)
        dropout = self.attn_drop if self.training else 0.0
        if dropout > 0 or not plain(qkv):
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, N, d)
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)
        else:
            out = self_attention(qkv, self.num_heads, kernels=self.kernels)
        return F.dropout(self.proj(out), self.proj_drop, self.training)


class Mlp(nn.Module):
    """Linear2(gelu(Linear1(x))), x (..., D) -> (..., D), with dropout behind both; parameters fc1 and fc2."""

    def __init__(self, in_features: int, hidden_features: int | None = None, *, drop: float = 0.0) -> None:
        super().__init__()
        check_rates(drop=drop)
        self.fc1 = nn.Linear(in_features, hidden_features or in_features)
        self.fc2 = nn.Linear(hidden_features or in_features, in_features)
        self.drop = drop

    def drops(self) -> bool:
        """Whether dropout is at work."""
        return self.training and self.drop > 0

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., in_features)."""
        x = F.dropout(F.gelu(self.fc1(x)), self.drop, self.training)
        return F.dropout(self.fc2(x), self.drop, self.training)


class LayerScale(nn.Module):
    """x * gamma, one learned factor per channel (arXiv 2103.17239)."""

    def __init__(self, dim: int, init_values: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return x * self.gamma
