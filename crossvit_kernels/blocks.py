"""The compositions of a vision transformer, each once, over plain modules: what the ops compute one behind another with
the weights of modules that are not called.

    transformer_block    a block, in inference in one call into C++; attention_half and mlp_half its residual halves
    class_attention      the attention half of a block whose only query is the CLS token
    fusion_direction     one direction of a CrossViT stage's fusion, in inference in one op
    projection           act(Linear(act(LayerNorm(x))))
    pool                 attention pooling with one latent query
    embed                an image's patches behind the CLS token, with their positions

Each returns None, and has computed nothing, where the ops do not take these tensors: the caller then calls its modules.
Whether the modules are what a composition stands for is the question before: `why_not` says in words what stands
against it, `fuses` is its quick form (see `composition.py`).
"""

from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .kinds import plain, takes
from .ops import (
    cls_cross_attention,
    cls_fusion,
    layer_norm_linear,
    layer_norm_mlp,
    linear_residual,
    patch_embed,
    self_attention,
)
from .ops import transformer_block as native
from .prepared import Place, keep


def regular(*linears: tuple[Tensor, Tensor | None]) -> bool:
    """Whether every Linear's bias has one element for each row of its weight; another might broadcast."""
    return all(bias is None or bias.shape == weight.shape[:1] for weight, bias in linears)


def affine(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of a LayerNorm, Linear or Conv2d, in the order in which the ops take them."""
    parameters = module._parameters  # a third of the time that nn.Module's own attribute lookup takes
    try:
        return parameters["weight"], parameters["bias"]  # type: ignore[return-value]
    except KeyError:  # a wrapper (FSDP1, DataParallel) keeps them as plain attributes
        return cast(tuple[Tensor, Tensor | None], (module.weight, module.bias))


def drop_path_scale(x: Tensor, rate: float, scale_by_keep: bool = True) -> Tensor:
    """(B, 1, ..., 1) like x (B, ...): 1 / (1 - rate), or 1, for the samples whose branch is kept, 0 for the others
    (stochastic depth, arXiv 1603.09382)."""
    keep = 1 - rate
    scale = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
    return scale.div_(keep) if scale_by_keep and keep > 0 else scale


class Residual(NamedTuple):
    """What a residual branch is multiplied by before it is added: by LayerScale's factor per channel, gamma (D,), and
    by drop path's per sample, which drops a share `rate` of them."""

    gamma: Tensor | None = None
    rate: float = 0.0
    scale_by_keep: bool = True

    def fits(self, x: Tensor) -> bool:
        """Whether one of the ops' scales says it: per channel or per sample, not their product."""
        gamma = self.gamma
        if gamma is None:
            return True
        if self.rate > 0 or not plain(gamma) or not gamma.is_floating_point() or gamma.dim() != 1:
            return False
        if gamma.shape[0] != x.shape[-1]:
            return False
        return gamma.dtype is x.dtype or torch.float64 not in (gamma.dtype, x.dtype)

    def scale(self, x: Tensor) -> Tensor | None:
        """The factor as the ops take it; draws a drop path's samples."""
        return self.gamma if self.rate <= 0 else drop_path_scale(x, self.rate, self.scale_by_keep)


def transformer_block(
    x: Tensor, block: Any, first: Residual | None, second: Residual | None, kernels: str, place: Place
) -> Tensor | None:
    """x (B, N, D) -> (B, N, D), both halves of a block in inference, in one call into C++, which is kept for `again`;
    None where the halves are to be called one by one: also where gradients are taken, under autocast and on another
    backend than the C++ one. `block` has timm's names."""
    if first is None or second is None or torch.is_grad_enabled() or first.rate > 0 or second.rate > 0:
        return None
    if affine(block.norm1)[0] is None or affine(block.norm2)[0] is None:
        return None

    def arguments(first_gamma: Tensor | None, second_gamma: Tensor | None) -> tuple[Any, ...]:
        norm1, attn, norm2, mlp = block.norm1, block.attn, block.norm2, block.mlp
        attention = (*affine(norm1), norm1.eps, *affine(attn.qkv), attn.num_heads, *affine(attn.proj), first_gamma)
        return x, *attention, *affine(norm2), norm2.eps, *affine(mlp.fc1), *affine(mlp.fc2), second_gamma

    def read() -> tuple[Any, ...]:
        return arguments(*(getattr(scale, "gamma", None) for scale in (block.ls1, block.ls2)))

    given = arguments(first.gamma, second.gamma)
    out = native.transformer_block(*given, kernels=kernels)
    if out is not None:
        keep(place, native.NAME, kernels, (x,), given, read, (block,))
    return out


def attention_half(x: Tensor, norm: Any, attn: Any, residual: Residual | None, kernels: str) -> Tensor | None:
    """x + scale * proj(softmax(q k^T / sqrt(d)) v), q, k, v = qkv(norm(x)); x (B, N, D) -> (B, N, D).

    `attn` has the Linears qkv and proj and its num_heads. Without a residual, as in `mlp_half`, None.
    """
    if residual is None:
        return None
    norms, qkv, proj = affine(norm), affine(attn.qkv), affine(attn.proj)
    if not (takes(x, (*qkv, *proj), norms) and regular(qkv, proj) and residual.fits(x)):
        return None
    heads = self_attention(
        layer_norm_linear(x, *norms, *qkv, norm.eps, kernels=kernels), attn.num_heads, kernels=kernels
    )
    return linear_residual(heads, *proj, x, scale=residual.scale(x), kernels=kernels)


def mlp_half(x: Tensor, norm: Any, mlp: Any, residual: Residual | None, kernels: str) -> Tensor | None:
    """x + scale * fc2(gelu(fc1(norm(x)))), x (..., D) -> (..., D)."""
    if residual is None:
        return None
    norms, fc1, fc2 = affine(norm), affine(mlp.fc1), affine(mlp.fc2)
    if not (takes(x, (*fc1, *fc2), norms) and regular(fc1, fc2) and residual.fits(x)):
        return None
    return layer_norm_mlp(x, *norms, *fc1, *fc2, norm.eps, scale=residual.scale(x), kernels=kernels)


def class_attention(
    cls: Tensor,
    patches: Tensor,
    norm: Any,
    linears: tuple[Any, Any, Any, Any],
    num_heads: int,
    residual: Residual,
    kernels: str,
) -> Tensor | None:
    """cls + scale * proj(CA(cls, patches)), where CA is `cls_cross_attention`; cls (B, D), patches (B, N, D) -> (B, D).

    `linears`: the projections of queries, keys and values, and the one behind the attention.
    """
    norms, pairs = affine(norm), [affine(linear) for linear in linears]
    weights, proj = [t for pair in pairs[:3] for t in pair], pairs[3]
    if not (takes(cls, (patches, *weights, *proj), norms) and regular(*pairs) and residual.fits(cls)):
        return None
    context = cast(Any, cls_cross_attention)(cls, patches, *norms, *weights, num_heads, norm.eps, kernels=kernels)
    return linear_residual(context, *proj, cls, scale=residual.scale(cls), kernels=kernels)


def projection(
    x: Tensor, norm: Any, linear: Any, kernels: str, *, pre_activation: str | None = None, activation: str | None = None
) -> Tensor | None:
    """act(linear(pre_act(norm(x)))), both activations None or "gelu"; x (..., D) -> (..., E)."""
    norms, weights = affine(norm), affine(linear)
    if not (takes(x, weights, norms) and regular(weights)):
        return None
    return layer_norm_linear(
        x, *norms, *weights, norm.eps, pre_activation=pre_activation, activation=activation, kernels=kernels
    )


_BEFORE_KEY_BIAS = 11  # arguments of cls_fusion: CLS, patches, a norm and a Linear, a norm and the queries, the keys


def fusion_direction(
    cls: Tensor,
    patches: Tensor,
    project: tuple[Any, Any],
    norm: Any,
    linears: tuple[Any, Any, Any, Any],
    attn: Any,
    revert: tuple[Any, Any],
    kernels: str,
    place: Place,
) -> Tensor | None:
    """A branch's CLS (B, D_d) after it has looked at the other branch's patches (B, N, D), in inference, kept for
    `again`; None where its three steps (`projection`, `class_attention`, `projection`) are to be called: also where
    gradients are taken, and where the three LayerNorms do not share one eps.

    project, revert: the LayerNorm and the Linear to the other width, and back. norm, linears: as in `class_attention`.
    attn: has the num_heads.
    """
    if torch.is_grad_enabled():
        return None

    def read() -> tuple[Any, ...]:
        """The norms, the Linears, and the arguments of the native op, which takes no bias of the keys: it adds the same
        to every score. There are none where the eps differ."""
        norms = [*map(affine, (project[0], norm, revert[0]))]
        weights = [*map(affine, (project[1], *linears, revert[1]))]
        if not project[0].eps == norm.eps == revert[0].eps:
            return norms, weights, ()
        to, q, k, v, out, back = weights
        before = (*norms[0], *to, *norms[1], *q, k[0])
        return norms, weights, (cls, patches, *before, *v, *out, *norms[2], *back, attn.num_heads, norm.eps)

    norms, weights, given = read()
    if not given or not takes(cls, (patches, *chain.from_iterable(weights)), tuple(chain.from_iterable(norms))):
        return None
    if not regular(*weights):
        return None
    before, behind = given[:_BEFORE_KEY_BIAS], given[_BEFORE_KEY_BIAS:]
    fused: Tensor = cast(Any, cls_fusion)(*before, weights[2][1], *behind, kernels=kernels)
    modules = (*project, norm, *linears, attn, *revert)
    keep(place, "cls_fusion", kernels, (cls, patches), given, lambda: read()[2], modules)
    return fused


def pool(
    x: Tensor, latent: Tensor, q: Any, kv: Any, num_heads: int, head_dim: int, pos_embed: Tensor | None
) -> Tensor | None:
    """Attention pooling with one latent query, which no LayerNorm precedes; tokens x (B, N, D) -> the heads, joined,
    (B, H d). Keys and values are not formed:

        u_h = W_k,h^T q_h / sqrt(d)      p_h = softmax_n(u_h . x_n)      out_h = W_v,h (sum_n p_hn x_n) + b_v,h

    The query is a parameter, so u is one matrix (H, D) for all images: two thin products over the tokens, which torch
    does well. latent (1, 1, L); q: a Linear or an Identity; kv: the Linear of keys and values; pos_embed (N, D).
    Scores and softmax are float32.
    """
    weight, bias = affine(kv)
    queries = affine(q) if type(q) is nn.Linear else ()
    if x.device.type not in ("cpu", "cuda") or x.dtype is torch.float64:
        return None
    if not takes(x, (latent, weight, bias, *queries)) or not plain(pos_embed):
        return None
    if not regular((weight, bias)) or latent.shape[:2] != (1, 1) or (pos_embed is not None and pos_embed.dim() != 2):
        return None
    if pos_embed is not None:
        x = x + pos_embed[None].to(x.dtype)
    to_key, to_value = weight.unflatten(0, (2, num_heads, head_dim)).unbind(0)  # (H, d, D) each
    query = q(latent[0, 0]).unflatten(0, (num_heads, head_dim))
    with torch.autocast(x.device.type, enabled=False):
        absorbed = torch.einsum("hd,hdc->hc", query.float() * head_dim**-0.5, to_key.float())
        tokens = x.float()
        probs = (tokens @ absorbed.T).softmax(dim=1)  # (B, N, H); the key's bias adds the same to every token
        context = probs.transpose(1, 2) @ tokens  # (B, H, D)
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else weight.dtype
    out = torch.einsum("bhc,hdc->bhd", context.to(dtype), to_value.to(dtype)).flatten(1)
    return out if bias is None else out + bias.unflatten(0, (2, -1))[1].to(dtype)


def embed(
    images: Tensor,
    proj: Any,
    cls_token: Tensor,
    pos_embed: Tensor,
    image_size: tuple[int, int],
    kernels: str,
    place: Place | None = None,
) -> Tensor | None:
    """[cls_token || patches of the resized images, projected] + pos_embed; images (B, C, H, W) -> (B, 1 + N, D). With a
    place the call is kept for `again`.

    `proj`: a convolution whose stride is its kernel's size.
    """
    weights = affine(proj)
    if not takes(images, (*weights, cls_token, pos_embed)) or not regular(weights):
        return None
    (height, width), patch, embed_dim = image_size, proj.stride[0], weights[0].shape[0]
    tokens = 1 + (height // patch) * (width // patch)
    if weights[0].shape[2:] != proj.stride or height % patch or width % patch:
        return None
    if cls_token.shape != (1, 1, embed_dim) or pos_embed.shape != (1, tokens, embed_dim):
        return None
    out = patch_embed(images, *weights, cls_token, pos_embed, image_size=image_size, kernels=kernels)
    if place is not None and type(image_size) is tuple:  # a list may be changed where it is

        def read() -> tuple[Any, ...]:
            return images, *affine(proj), cls_token, pos_embed, *cast(Any, place[0]).image_size

        given = (images, *weights, cls_token, pos_embed, *image_size)
        keep(place, "patch_embed", kernels, (images, cls_token, pos_embed), given, read, (proj,))
    return out
