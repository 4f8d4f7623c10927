"""The children that the modules' fused compositions stand for."""

from ..composition import Composition
from ..kinds import GELU, LAYER_NORM, LINEAR, PATCH_CONVOLUTION, kind

_ATTENTION = kind("crossvit_kernels.nn.layers:Attention", settings=("num_heads", "drops"))
_CROSS_ATTENTION = kind("crossvit_kernels.nn.cross_attention:CrossAttention", settings=("num_heads", "drops"))
_LAYER_SCALE = kind("crossvit_kernels.nn.layers:LayerScale", optional=True)
ATTENTION_HALF = Composition(
    "attention half",
    {"norm1": LAYER_NORM, "attn": _ATTENTION, "attn.qkv": LINEAR, "attn.proj": LINEAR, "ls1": _LAYER_SCALE},
)
MLP_HALF = Composition(
    "MLP half",
    {
        "norm2": LAYER_NORM,
        "mlp": kind("crossvit_kernels.nn.layers:Mlp", settings=("drops",)),
        "mlp.fc1": LINEAR,
        "mlp.fc2": LINEAR,
        "ls2": _LAYER_SCALE,
    },
)
HALVES = (ATTENTION_HALF, MLP_HALF)
CLASS_ATTENTION = Composition(
    "class attention",
    {"norm1": LAYER_NORM, "attn": _CROSS_ATTENTION} | {f"attn.{n}": LINEAR for n in ("wq", "wk", "wv", "proj")},
)
EMBED = Composition("patch embedding", {"proj": PATCH_CONVOLUTION}, settings=("image_size",))


def _sequence(pre_activation: str | None, activation: str | None) -> Composition:
    """LayerNorm, [GELU], Linear, [GELU] under a Sequential's names."""
    steps = [LAYER_NORM, *([GELU] if pre_activation else []), LINEAR, *([GELU] if activation else [])]
    return Composition("projection", {str(i): step for i, step in enumerate(steps)})


PROJECTIONS = {(pre, act): _sequence(pre, act) for pre in (None, "gelu") for act in (None, "gelu")}
