"""timm's attention pooling with one latent query (SigLIP), without keys and values, as in cls_cross_attention."""

from typing import Any

from timm.layers import AttentionPoolLatent
from torch import Tensor

from .. import blocks
from ..blocks import Residual
from ..composition import KERNELS, Composition
from ..kinds import IDENTITY, LAYER_NORM, LINEAR, LINEAR_OR_IDENTITY, plain
from ..watch import fuses
from . import Swap, drops
from .vision_transformer import MLP

_ENTRY = (AttentionPoolLatent, "forward")
POOL = Composition("pooling", {"q": LINEAR_OR_IDENTITY, "kv": LINEAR, "q_norm": IDENTITY, "k_norm": IDENTITY}, _ENTRY)
MLP_HALF = Composition("MLP half", {"norm": LAYER_NORM, **MLP}, _ENTRY)


class FusedAttentionPoolLatent(Swap, AttentionPoolLatent):
    """timm.layers.AttentionPoolLatent: tokens (B, N, D) -> (B, out_features)."""

    _crossvit_entry, known = _ENTRY, (POOL,)

    @staticmethod
    def unusual(module: Any) -> str | None:
        if module.latent_len != 1:
            return f"it has {module.latent_len} queries"
        return None if module.scale == module.head_dim**-0.5 else "its scale is not 1 / sqrt(d)"

    def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        kernels: Any = getattr(self, KERNELS, None)  # None: restored a moment ago
        known = (
            kernels is not None and plain(x) and attn_mask is None and FusedAttentionPoolLatent.unusual(self) is None
        )
        pooled: Tensor | None = None
        if known and fuses(self, POOL):
            pooled = blocks.pool(x, self.latent, self.q, self.kv, self.num_heads, self.head_dim, self.pos_embed)
        if pooled is None:
            return AttentionPoolLatent.forward(self, x, attn_mask)
        x = self.proj_drop(self.proj(pooled[:, None]))
        if (mlp := self.mlp) is not None:
            added = Residual() if fuses(self, MLP_HALF) and not drops(mlp.drop1, mlp.drop2) else None
            out = blocks.mlp_half(x, self.norm, mlp, added, kernels)
            x = x + mlp(self.norm(x)) if out is None else out
        if self.pool == "token":
            return x[:, 0]
        return x.mean(1) if self.pool == "avg" else x
