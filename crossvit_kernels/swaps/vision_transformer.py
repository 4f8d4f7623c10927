"""timm's transformer block: ViT, DeiT and CrossViT's branches."""

from typing import Any

from timm.layers import LayerScale
from timm.models.vision_transformer import Block
from torch import Tensor

from .. import blocks
from ..blocks import Residual
from ..composition import KERNELS, Composition
from ..kinds import ABSENT, DROPOUT, GELU, IDENTITY, LAYER_NORM, LINEAR, Kind, kind, plain
from ..prepared import again
from ..watch import fuses_each
from . import DROP_PATH, Swap, drop_path_rate, drops, wrong_scale


def wrong_attention(attn: Any) -> str | None:
    """Why `attn` does not scale its scores by 1 / sqrt(d), or has other heads than its projection."""
    if (why := wrong_scale(attn.scale, attn.head_dim)) is not None:
        return why
    rows, wanted = getattr(attn.qkv, "out_features", None), 3 * attn.num_heads * attn.head_dim
    if rows is not None and rows != wanted:
        return f"has {attn.num_heads} heads of {attn.head_dim}, and a projection to {rows} features"
    return None


LAYER_SCALE = kind("timm.layers.layer_scale:LayerScale", "torch.nn.modules.linear:Identity")
MLP: dict[str, Kind] = {
    "mlp": kind("timm.layers.mlp:Mlp"),
    "mlp.fc1": LINEAR,
    "mlp.act": GELU,
    "mlp.drop1": DROPOUT,
    "mlp.norm": IDENTITY,
    "mlp.fc2": LINEAR,
    "mlp.drop2": DROPOUT,
}
_ENTRY = (Block, "forward")
ATTENTION_HALF = Composition(
    "attention half",
    {
        "norm1": LAYER_NORM,
        "attn": kind(
            "timm.layers.attention:Attention", wrong=wrong_attention, settings=("scale", "head_dim", "num_heads")
        ),
        "attn.qkv": LINEAR,
        "attn.q_norm": IDENTITY,
        "attn.k_norm": IDENTITY,
        "attn.attn_drop": DROPOUT,
        "attn.norm": IDENTITY,
        "attn.gate": ABSENT,
        "attn.proj": LINEAR,
        "attn.proj_drop": DROPOUT,
        "ls1": LAYER_SCALE,
        "drop_path1": DROP_PATH,
    },
    _ENTRY,
)
MLP_HALF = Composition("MLP half", {"norm2": LAYER_NORM, **MLP, "ls2": LAYER_SCALE, "drop_path2": DROP_PATH}, _ENTRY)
HALVES = (ATTENTION_HALF, MLP_HALF)


def residual(layer_scale: Any, drop_path: Any) -> Residual:
    """What a residual branch is multiplied by: by a LayerScale (or an Identity), and by a drop path."""
    gamma = layer_scale.gamma if type(layer_scale) is LayerScale else None
    return Residual(gamma, *drop_path_rate(drop_path))


def attention_drops(attn: Any) -> bool:
    """Whether one of its dropouts is at work; timm's attention looks at its own mode for that of the scores."""
    return drops(attn.attn_drop, attn.proj_drop) or (attn.training and getattr(attn.attn_drop, "p", 0.0) > 0)


class FusedBlock(Swap, Block):
    """timm.models.vision_transformer.Block: x (B, N, D) -> (B, N, D)."""

    _crossvit_entry, known = _ENTRY, HALVES

    def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        kernels: Any = getattr(self, KERNELS, None)  # None: restored a moment ago
        given: dict[str, Any] = {} if attn_mask is None else {"attn_mask": attn_mask}
        given |= {} if is_causal is False else {"is_causal": is_causal}
        if not plain(x):  # what torch.fx traces with: nothing may be asked of it
            return Block.forward(self, x, **given)
        known = kernels is not None and not given
        out: Tensor | None = again(self, HALVES, x) if known else None
        if out is not None:
            return out
        attention, mlp = fuses_each(self, HALVES) if known else (False, False)
        first = residual(self.ls1, self.drop_path1) if attention and not attention_drops(self.attn) else None
        second = residual(self.ls2, self.drop_path2) if mlp and not drops(self.mlp.drop1, self.mlp.drop2) else None
        if first is None and second is None:
            return Block.forward(self, x, **given)
        out = blocks.transformer_block(x, self, first, second, kernels, (self, HALVES, HALVES))
        if out is not None:
            return out
        out = blocks.attention_half(x, self.norm1, self.attn, first, kernels)
        if out is None:
            out = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        last = blocks.mlp_half(out, self.norm2, self.mlp, second, kernels)
        return out + self.drop_path2(self.ls2(self.mlp(self.norm2(out)))) if last is None else last
