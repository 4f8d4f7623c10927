"""timm's attention pooling with one latent query (SigLIP): keys and values are not formed, as in cls_cross_attention.

    u_h = W_k,h^T q_h / sqrt(d)      p_h = softmax_n(u_h . x_n)      out_h = W_v,h (sum_n p_hn x_n) + b_v,h

The query is a parameter, so u is one matrix (H, D) for all images, and the tokens come normalised: two thin products
over them, which torch does well.
"""

from typing import Any

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from ..ops import layer_norm_mlp
from . import Swap, affine, disturbance, drops, wrong_drop, wrong_linear, wrong_norm, wrong_type
from .vision_transformer import wrong_mlp


class FusedAttentionPoolLatent(Swap, AttentionPoolLatent):
    """timm.layers.AttentionPoolLatent: tokens (B, N, D) -> (B, out_features)."""

    def refusal(self: Any) -> str | None:
        why = None
        if self.latent_len != 1:
            why = f"it has {self.latent_len} queries"
        elif self.mlp is None:
            why = "it has no output projection"
        elif type(self.q) is not nn.Identity:
            why = wrong_linear(("q", self.q))
        return (
            why
            or disturbance(self)
            or wrong_linear(("kv", self.kv), ("proj", self.proj))
            or wrong_type("q_norm", self.q_norm, nn.Identity)
            or wrong_type("k_norm", self.k_norm, nn.Identity)
            or wrong_drop(("proj_drop", self.proj_drop))
            or (None if type(self.norm) is nn.Identity else wrong_norm("norm", self.norm))
            or wrong_mlp(self.mlp)
            or (None if self.scale == self.head_dim**-0.5 else "scale is not 1 / sqrt(d)")
        )

    def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if attn_mask is not None or not self.ready() or drops(self.proj_drop):
            return super().forward(x, attn_mask)
        if self.pos_embed is not None:
            x = x + self.pos_embed[None].to(x.dtype)
        x = self.proj(self._attend(x))[:, None]
        mlp = self.mlp
        if type(self.norm) is nn.Identity or drops(mlp.drop1, mlp.drop2):
            x = x + mlp(self.norm(x))
        else:
            weights = (*affine(self.norm), *affine(mlp.fc1), *affine(mlp.fc2))
            x = layer_norm_mlp(x, *weights, self.norm.eps, kernels=self._crossvit_kernels)
        if self.pool == "token":
            return x[:, 0]
        return x.mean(1) if self.pool == "avg" else x

    def _attend(self: Any, x: Tensor) -> Tensor:
        """The heads, joined, (B, D); scores and softmax in float32."""
        weight, bias = affine(self.kv)
        to_key, to_value = weight.unflatten(0, (2, self.num_heads, self.head_dim)).unbind(0)  # (H, d, D) each
        query = self.q(self.latent[0, 0]).unflatten(0, (self.num_heads, self.head_dim))
        with torch.autocast(x.device.type, enabled=False):
            absorbed = torch.einsum("hd,hdc->hc", query.float() * self.scale, to_key.float())
            tokens = x.float()
            probs = (tokens @ absorbed.T).softmax(dim=1)  # (B, N, H); the key's bias adds the same to every token
            context = probs.transpose(1, 2) @ tokens  # (B, H, D)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else weight.dtype
        out = torch.einsum("bhc,hdc->bhd", context.to(dtype), to_value.to(dtype)).flatten(1)
        return out if bias is None else out + bias.unflatten(0, (2, -1))[1].to(dtype)
