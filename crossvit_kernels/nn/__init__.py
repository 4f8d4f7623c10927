"""Drop-in modules over the ops, with timm's constructor arguments and parameter names, so that timm's state dicts load
as they are.

Each forward applies its children's weights itself, through the compositions of `blocks.py`, as long as nothing stands
against that. Where something does (a child of another class, a hook, weights that something computes, dropout at work,
dtypes that the ops do not take), that part of it calls its modules: the same result, without the fusion.
"""

from ..blocks import drop_path_scale
from .compositions import ATTENTION_HALF, CLASS_ATTENTION, EMBED, MLP_HALF, PROJECTIONS
from .cross_attention import CrossAttention, CrossAttentionBlock
from .layers import Attention, LayerNormLinear, LayerScale, Mlp
from .module import NO_SCRIPT, KernelModule, check_heads, check_kernels, check_rates, set_kernels
from .patch_embed import PatchEmbed, interpolated, resized
from .transformer import AttentionBlock, Block

__all__ = [
    "ATTENTION_HALF",
    "CLASS_ATTENTION",
    "EMBED",
    "MLP_HALF",
    "NO_SCRIPT",
    "PROJECTIONS",
    "Attention",
    "AttentionBlock",
    "Block",
    "CrossAttention",
    "CrossAttentionBlock",
    "KernelModule",
    "LayerNormLinear",
    "LayerScale",
    "Mlp",
    "PatchEmbed",
    "check_heads",
    "check_kernels",
    "check_rates",
    "drop_path_scale",
    "interpolated",
    "resized",
    "set_kernels",
]
