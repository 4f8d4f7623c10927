"""Drop-in modules over the ops, with timm's constructor arguments and parameter names, so that timm's state dicts load
as they are.

Each fused forward reads its children's weights itself; forward hooks on a child (`attn.qkv`, `norm1`, ...) do not run
there. A child that was replaced by another kind of module (an adapter, a quantised Linear) is called as a module
instead, and so is every child where dropout asks for what the ops do not do: the same result, without the fusion.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends
from .ops import (
    bicubic_resize,
    cls_cross_attention,
    layer_norm_linear,
    layer_norm_mlp,
    linear_residual,
    patch_embed,
    self_attention,
)
from .ops._transformer_block import transformer_block


def check_kernels(kernels: str) -> str:
    """`kernels` itself if it is "auto" or a backend that is there. Raises ValueError (unknown name), RuntimeError (not
    there, and why).
    """
    if kernels != "auto" and (why := backends.reason(kernels)):
        raise RuntimeError(f"kernels={kernels!r} is not available: {why}")
    return kernels


class KernelModule(nn.Module):
    """A module whose forward calls ops; `kernels` is what it hands them."""

    def __init__(self, *, kernels: str = "auto") -> None:
        super().__init__()
        self.kernels = check_kernels(kernels)


def set_kernels(module: nn.Module, kernels: str) -> None:
    """Makes `module` and every module inside it use `kernels`. Raises as `check_kernels` does, and then changes
    nothing.
    """
    check_kernels(kernels)
    for child in module.modules():
        if isinstance(child, KernelModule):
            child.kernels = kernels


def affine(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of a LayerNorm, Linear or Conv2d, in the order in which the ops take them."""
    parameters = module._parameters  # a third of the time that nn.Module's own attribute lookup takes
    try:
        return parameters["weight"], parameters["bias"]  # type: ignore[return-value]
    except KeyError:  # a parametrisation computes them
        return cast(tuple[Tensor, Tensor | None], (module.weight, module.bias))


def whole_block(
    x: Tensor,
    norm1: nn.Module,
    attn: Any,
    scale1: Tensor | None,
    norm2: nn.Module,
    mlp: Any,
    scale2: Tensor | None,
    kernels: str,
) -> Tensor | None:
    """`ops._transformer_block.transformer_block` with the weights of a block's modules; None where that is."""
    if not (isinstance(norm1, nn.LayerNorm) and isinstance(norm2, nn.LayerNorm)):
        return None
    first = (*affine(norm1), norm1.eps, *affine(attn.qkv), attn.num_heads, *affine(attn.proj), scale1)
    second = (*affine(norm2), norm2.eps, *affine(mlp.fc1), *affine(mlp.fc2), scale2)
    return transformer_block(x, *first, *second, kernels=kernels)


def drop_path_scale(x: Tensor, rate: float) -> Tensor:
    """(B, 1, ..., 1) like x (B, ...): 1 / (1 - rate) for the samples whose branch is kept, 0 for the others (stochastic
    depth, arXiv 1603.09382).
    """
    keep = 1 - rate
    scale = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
    return scale.div_(keep) if keep > 0 else scale


def check_rates(**rates: float) -> None:
    """Raises ValueError for a probability outside [0, 1]."""
    for name, rate in rates.items():
        if not 0 <= rate <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {rate}")


def check_heads(dim: int, num_heads: int) -> None:
    """Raises ValueError unless `num_heads` divides `dim`."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide the width, got num_heads={num_heads} for dim={dim}")


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

    def fusable(self) -> bool:
        """Whether the children are still the modules that the op stands for."""
        return isinstance(self.norm, nn.LayerNorm) and isinstance(self.linear, nn.Linear)

    def forward(self, x: Tensor) -> Tensor:
        if not self.fusable():
            return nn.Sequential.forward(self, x)
        norm = self.norm
        return layer_norm_linear(
            x,
            *affine(norm),
            *affine(self.linear),
            norm.eps,
            pre_activation=self.pre_activation,
            activation=self.activation,
            kernels=self.kernels,
        )


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

    def fusable(self) -> bool:
        """Whether a block may apply the weights itself: no dropout now, and the children are Linears."""
        dropout = self.training and (self.attn_drop > 0 or self.proj_drop > 0)
        return not dropout and isinstance(self.qkv, nn.Linear) and isinstance(self.proj, nn.Linear)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        if self.training and self.attn_drop > 0:
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, N, d)
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop).transpose(1, 2).flatten(2)
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

    def fusable(self) -> bool:
        """Whether a block may apply the weights itself: no dropout now, and the children are Linears."""
        dropout = self.training and self.drop > 0
        return not dropout and isinstance(self.fc1, nn.Linear) and isinstance(self.fc2, nn.Linear)

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
        norm, attn = self.norm1, self.attn
        if not (self._scales_once(self.ls1) and isinstance(norm, nn.LayerNorm) and attn.fusable()):
            return self._add(x, attn(norm(x)), self.ls1)
        qkv = layer_norm_linear(x, *affine(norm), *affine(attn.qkv), norm.eps, kernels=self.kernels)
        heads = self_attention(qkv, attn.num_heads, kernels=self.kernels)
        return linear_residual(heads, *affine(attn.proj), x, scale=self._scale(x, self.ls1), kernels=self.kernels)

    def _scales_once(self, layer_scale: LayerScale | None) -> bool:
        # The ops take one scale: per sample (drop path) or per channel (LayerScale), not their product.
        return layer_scale is None or not (self.training and self.drop_path > 0)

    def _scale(self, x: Tensor, layer_scale: LayerScale | None) -> Tensor | None:
        if self.training and self.drop_path > 0:
            return drop_path_scale(x, self.drop_path)
        return None if layer_scale is None else layer_scale.gamma

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
        norm, mlp = self.norm2, self.mlp
        fused = isinstance(norm, nn.LayerNorm) and mlp.fusable()
        if fused and not (self.training or torch.is_grad_enabled()) and self.attn.fusable():
            scales = [None if ls is None else ls.gamma for ls in (self.ls1, self.ls2)]
            if (
                out := whole_block(x, self.norm1, self.attn, scales[0], norm, mlp, scales[1], self.kernels)
            ) is not None:
                return out
        x = super().forward(x)
        if not (self._scales_once(self.ls2) and fused):
            return self._add(x, mlp(norm(x)), self.ls2)
        scale = self._scale(x, self.ls2)
        return layer_norm_mlp(
            x, *affine(norm), *affine(mlp.fc1), *affine(mlp.fc2), norm.eps, scale=scale, kernels=self.kernels
        )


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

    def fusable(self) -> bool:
        """Whether a block may apply the weights itself: no dropout now, and the children are Linears."""
        dropout = self.training and (self.attn_drop > 0 or self.proj_drop > 0)
        return not dropout and all(isinstance(x, nn.Linear) for x in (self.wq, self.wk, self.wv, self.proj))

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

    def fusable(self) -> bool:
        """Whether the op can do all but the drop path: no dropout now, and the children are what it stands for."""
        return isinstance(self.norm1, nn.LayerNorm) and self.attn.fusable()

    def forward(self, x: Tensor, patches: Tensor | None = None) -> Tensor:
        if patches is None:
            return self(x[:, 0], x[:, 1:])[:, None]
        norm, attn = self.norm1, self.attn
        if not self.fusable():
            update = attn(norm(torch.cat((x[:, None], patches), dim=1)))[:, 0]
            return x + (update * drop_path_scale(x, self.drop_path) if self.training and self.drop_path > 0 else update)
        weights = (*affine(norm), *affine(attn.wq), *affine(attn.wk), *affine(attn.wv))
        context = cls_cross_attention(x, patches, *weights, attn.num_heads, norm.eps, kernels=self.kernels)
        scale = drop_path_scale(x, self.drop_path) if self.training and self.drop_path > 0 else None
        return linear_residual(context, *affine(attn.proj), x, scale=scale, kernels=self.kernels)


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
        proj = self.proj
        if isinstance(proj, nn.Conv2d) and proj.kernel_size == proj.stride:
            return patch_embed(
                images, *affine(proj), cls_token, pos_embed, image_size=self.image_size, kernels=self.kernels
            )
        images = bicubic_resize(images, self.image_size, kernels=self.kernels)
        patches = proj(images).flatten(2).transpose(1, 2)
        return torch.cat((cls_token.expand(patches.shape[0], -1, -1), patches), dim=1) + pos_embed
