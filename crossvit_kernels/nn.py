"""Drop-in modules over the ops, with timm's constructor arguments and parameter names, so that timm's state dicts load
as they are.

Each forward applies its children's weights itself, through the compositions of `blocks.py`, as long as nothing stands
against that. Where something does (a child of another class, a hook, weights that something computes, dropout at work,
dtypes that the ops do not take), that part of it calls its modules: the same result, without the fusion.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends, blocks
from .blocks import Residual, drop_path_scale
from .composition import Composition, fuses
from .kinds import GELU, LAYER_NORM, LINEAR, PATCH_CONVOLUTION, kind, plain
from .ops import bicubic_resize, self_attention


def check_kernels(kernels: str) -> str:
    """`kernels` itself if it is "auto" or a backend that is there. Raises ValueError (unknown name), RuntimeError (not
    there, and why).
    """
    if kernels != "auto" and (why := backends.reason(kernels)):
        raise RuntimeError(f"kernels={kernels!r} is not available: {why}")
    return kernels


NO_SCRIPT = (
    "TorchScript cannot compile modules that run on the kernels: for a model that was accelerated call "
    "crossvit_kernels.restore(model) first; torch.jit.trace and torch.export take them as they are"
)


class KernelModule(nn.Module):
    """A module whose forward calls ops; `kernels` is what it hands them."""

    def __init__(self, *, kernels: str = "auto") -> None:
        super().__init__()
        self.kernels = check_kernels(kernels)

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(NO_SCRIPT)


def set_kernels(module: nn.Module, kernels: str) -> None:
    """Makes `module` and every module inside it use `kernels`. Raises as `check_kernels` does, and then changes
    nothing.
    """
    check_kernels(kernels)
    for child in module.modules():
        if isinstance(child, KernelModule):
            child.kernels = kernels


def check_rates(**rates: float) -> None:
    """Raises ValueError for a probability outside [0, 1]."""
    for name, rate in rates.items():
        if not 0 <= rate <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {rate}")


def check_heads(dim: int, num_heads: int) -> None:
    """Raises ValueError unless `num_heads` divides `dim`."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide the width, got num_heads={num_heads} for dim={dim}")


_ATTENTION = kind("crossvit_kernels.nn:Attention")
_CROSS_ATTENTION = kind("crossvit_kernels.nn:CrossAttention")
_LAYER_SCALE = kind("crossvit_kernels.nn:LayerScale", optional=True)
ATTENTION_HALF = Composition(
    "attention half",
    {"norm1": LAYER_NORM, "attn": _ATTENTION, "attn.qkv": LINEAR, "attn.proj": LINEAR, "ls1": _LAYER_SCALE},
)
MLP_HALF = Composition(
    "MLP half",
    {
        "norm2": LAYER_NORM,
        "mlp": kind("crossvit_kernels.nn:Mlp"),
        "mlp.fc1": LINEAR,
        "mlp.fc2": LINEAR,
        "ls2": _LAYER_SCALE,
    },
)
CLASS_ATTENTION = Composition(
    "class attention",
    {"norm1": LAYER_NORM, "attn": _CROSS_ATTENTION} | {f"attn.{n}": LINEAR for n in ("wq", "wk", "wv", "proj")},
)
EMBED = Composition("patch embedding", {"proj": PATCH_CONVOLUTION})


def _sequence(pre_activation: str | None, activation: str | None) -> Composition:
    """LayerNorm, [GELU], Linear, [GELU] under a Sequential's names."""
    steps = [LAYER_NORM, *([GELU] if pre_activation else []), LINEAR, *([GELU] if activation else [])]
    return Composition("projection", {str(i): step for i, step in enumerate(steps)})


_PROJECTIONS = {(pre, act): _sequence(pre, act) for pre in (None, "gelu") for act in (None, "gelu")}


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
        return cast(nn.LayerNorm, self._modules["0"])

    @property
    def linear(self) -> nn.Linear:
        return cast(nn.Linear, self._modules["2" if self.pre_activation else "1"])

    def composition(self) -> Composition:
        """The children that the op stands for."""
        return _PROJECTIONS[self.pre_activation, self.activation]

    def forward(self, x: Tensor) -> Tensor:
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
        x = F.dropout(F.gelu(self.fc1(x)), self.drop, self.training)
        return F.dropout(self.fc2(x), self.drop, self.training)


class LayerScale(nn.Module):
    """x * gamma, one learned factor per channel (arXiv 2103.17239)."""

    def __init__(self, dim: int, init_values: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


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
        return self._attention_half(x, self._residual(self.ls1) if self.fuses_attention() else None, self.kernels)

    def fuses_attention(self) -> bool:
        """Whether the ops may stand for the attention half now."""
        return fuses(self, ATTENTION_HALF) and not self.attn.drops()

    def _attention_half(self, x: Tensor, residual: Residual | None, kernels: str) -> Tensor:
        """By the ops, or without a `residual` by the modules."""
        if residual is not None:
            out = blocks.attention_half(x, self.norm1, self.attn, residual, kernels)
            if out is not None:
                return out
        return self._add(x, self.attn(self.norm1(x)), self.ls1)

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
        kernels = self.kernels
        first = self._residual(self.ls1) if self.fuses_attention() else None
        second = self._residual(self.ls2) if self.fuses_mlp() else None
        if first is not None and second is not None:
            out = blocks.transformer_block(x, self.norm1, self.attn, first, self.norm2, self.mlp, second, kernels)
            if out is not None:
                return out
        x = self._attention_half(x, first, kernels)
        if second is not None:
            out = blocks.mlp_half(x, self.norm2, self.mlp, second, kernels)
            if out is not None:
                return out
        return self._add(x, self.mlp(self.norm2(x)), self.ls2)

    def fuses_mlp(self) -> bool:
        """Whether the ops may stand for the MLP half now."""
        return fuses(self, MLP_HALF) and not self.mlp.drops()


class CrossAttention(nn.Module):
    """Attention of the first token over all tokens, x (B, 1 + N, D) -> (B, 1, D), plain PyTorch; parameters wq, wk, wv
    and proj.

    `CrossAttentionBlock` applies the same weights through the fused op, which takes the LayerNorm in front of them too.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        *,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
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


def resized(images: Tensor, image_size: tuple[int, int], kernels: str) -> Tensor:
    """Images (B, C, H, W) at this size, bicubic; the images themselves where they have it."""
    if plain(images):
        return bicubic_resize(images, image_size, kernels=kernels)
    return interpolated(images, image_size)


def interpolated(images: Tensor, image_size: tuple[int, int]) -> Tensor:
    """`resized` without an op of this package, as TorchScript compiles it too."""
    if images.shape[2] == image_size[0] and images.shape[3] == image_size[1]:
        return images
    return F.interpolate(images, [image_size[0], image_size[1]], mode="bicubic", align_corners=False)


# In a graph that torch.fx traces these two stay calls, which look at shapes when the graph runs.
torch.fx.wrap("interpolated")
torch.fx.wrap("drop_path_scale")


class PatchEmbed(KernelModule):
    """Patches, CLS token and positions: images (B, C, H, W), cls_token (1, 1, D), pos_embed (1, 1 + N, D) -> tokens (B,
    1 + N, D).

    Images of another size are resized (bicubic) to `image_size`, which `patch_size` must divide. `proj`, by default the
    convolution of stride `patch_size` that the op computes, may be any module (B, C, H, W) -> (B, D, H / patch_size, W
    / patch_size); parameters proj.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        *,
        proj: nn.Module | None = None,
        kernels: str = "auto",
    ) -> None:
        super().__init__(kernels=kernels)
        height, width = image_size
        if min(height, width) < patch_size or height % patch_size or width % patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size={patch_size}, got {height}×{width}")
        self.image_size = (height, width)
        self.patch_size = patch_size
        self.grid_size = (height // patch_size, width // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = proj or nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor, cls_token: Tensor, pos_embed: Tensor) -> Tensor:
        if fuses(self, EMBED):
            out = blocks.embed(images, self.proj, cls_token, pos_embed, self.image_size, self.kernels)
            if out is not None:
                return out
        patches = self.proj(resized(images, self.image_size, self.kernels)).flatten(2).transpose(1, 2)
        return torch.cat((cls_token.expand(patches.shape[0], -1, -1), patches), dim=1) + pos_embed
