"""patch_embed: a matrix product whose rows are patches, gathered, and where need be resized, as they are loaded. A
program holds the sums of all columns, so that it cuts out its patches once; positions and CLS tokens come with them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import defaults
from ..configs import configuration
from ..kernels.patch_embed import patch_embed_forward
from ..kernels.patch_gradients import patch_embed_batch_sum, patch_embed_images_gradient, patch_embed_weight_gradient
from ..kernels.resize_gradient import resize_axis_gradient
from ..launch import launch
from ..target import DTYPES, architecture, dot_precision, multiprocessors
from ..tiling import cdiv, tiles_per_program
from ..views import Images, images_of, pointers, row_blocks
from .linear import sum_partials


def forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor,
    pos_embed: Tensor,
    height: int,
    width: int,
    save: bool,
) -> Tensor:
    """out of the op, which saves nothing."""
    features, patch = weight.shape[0], weight.shape[3]
    cut = images_of(images, height, width, patch)
    dtype = torch.promote_types(torch.promote_types(weight.dtype, cls_token.dtype), pos_embed.dtype)
    out = images.new_empty((images.shape[0], *pos_embed.shape[1:]), dtype=dtype)
    name = "patch_embed_forward_resized" if cut.resize else "patch_embed_forward"
    default = defaults.patch_embed(features, weight.dtype, cut.resize, architecture())
    config = cut.fitted(configuration(name, features, weight.dtype, default))
    most = max(config["BLOCK_D"] // config["BLOCK_N"], 1)
    row_tiles, column_tiles = cut.lines * row_blocks(cut, config), cdiv(features, config["BLOCK_N"])
    tiles = tiles_per_program(row_tiles, column_tiles, most, multiprocessors())
    launch(
        patch_embed_forward,
        (row_tiles, cdiv(column_tiles, tiles)),
        config,
        **cut.arguments(),
        **pointers(weight=weight, bias=bias, cls=cls_token, pos=pos_embed),
        out_ptr=out,
        features=features,
        TILES=tiles,
        PRECISION=dot_precision(weight.dtype),
    )
    return out


def backward(
    grad_out: Tensor,
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor,
    pos_embed: Tensor,
    height: int,
    width: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of images, weight, bias, cls_token and pos_embed that are needed."""
    if grad_out.stride(2) != 1:
        grad_out = grad_out.contiguous()
    grads: list[Tensor] = []
    if needs[0]:
        grads.append(_images_gradient(grad_out, images, weight, height, width))
    if needs[1]:
        grads.append(_weight_gradient(grad_out, images_of(images, height, width, weight.shape[3]), weight))
    if needs[2] or needs[3] or needs[4]:
        grads += _batch_sums(grad_out, bias if needs[2] else None, cls_token if needs[3] else None,
                             pos_embed if needs[4] else None)  # fmt: skip
    return grads


def _weight_gradient(grad_out: Tensor, cut: Images, weight: Tensor) -> Tensor:
    features, channels, patch, _ = weight.shape
    grad = weight.new_empty(weight.shape)
    name = "patch_embed_weight_gradient_resized" if cut.resize else "patch_embed_weight_gradient"
    default = defaults.patch_embed_weight_gradient(features, weight.dtype, cut.resize, dot_precision(weight.dtype))
    config = cut.fitted(configuration(name, features, weight.dtype, default))
    chunks = channels * cdiv(patch, config["PX"]) * cdiv(patch, config["BLOCK_K"] // config["PX"])
    if not cut.resize:
        chunks = cdiv(channels * patch * patch, config["BLOCK_K"])
    tiles = min(max(config["BLOCK_D"] // config["BLOCK_N"], 1), cdiv(features, config["BLOCK_N"]))
    columns = cdiv(features, tiles * config["BLOCK_N"])
    row_tiles = cut.lines * row_blocks(cut, config)
    per_piece = cdiv(row_tiles, max(1, min(2 * multiprocessors() // (chunks * columns), row_tiles // 4)))
    pieces = cdiv(row_tiles, per_piece)
    partial = grad if pieces == 1 else grad.new_empty((pieces, grad.numel()), dtype=torch.float32)
    launch(
        patch_embed_weight_gradient,
        (chunks * pieces, columns),
        config,
        **cut.arguments(),
        grad_ptr=grad_out,
        grad_batch=grad_out.stride(0),
        grad_row=grad_out.stride(1),
        out_ptr=partial,
        features=features,
        row_tiles=row_tiles,
        tiles_per_piece=per_piece,
        TILES=tiles,
        CHUNKS=chunks,
        COMPUTE=DTYPES[weight.dtype],
        PRECISION=dot_precision(weight.dtype),
    )
    if pieces > 1:
        sum_partials(partial, grad.numel(), grad, None)
    return grad


def _images_gradient(grad_out: Tensor, images: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    features, channels, patch, _ = weight.shape
    cut = images_of(images, height, width, patch)
    dtype = torch.float32 if cut.resize else images.dtype
    grad = images.new_empty((images.shape[0], channels, height, width), dtype=dtype)
    default = defaults.patch_embed_images_gradient(weight.dtype)
    config = configuration("patch_embed_images_gradient", features, weight.dtype, default)
    launch(
        patch_embed_images_gradient,
        (cut.lines * row_blocks(cut, config), cdiv(channels * patch * patch, config["BLOCK_N"])),
        config,
        grad_ptr=grad_out,
        grad_batch=grad_out.stride(0),
        grad_row=grad_out.stride(1),
        weight_ptr=weight.contiguous(),
        out_ptr=grad,
        rows=cut.rows,
        per_row=cut.columns,
        lines=cut.lines,
        features=features,
        CHANNELS=channels,
        PATCH=patch,
        PRECISION=dot_precision(weight.dtype),
    )
    return resize_gradient(grad, images) if cut.resize else grad


def _batch_sums(
    grad_out: Tensor, bias: Tensor | None, cls_token: Tensor | None, pos_embed: Tensor | None
) -> list[Tensor]:
    """The gradients of those that are given."""
    batch, tokens, features = grad_out.shape
    grads = [None if t is None else t.new_empty(t.shape) for t in (bias, cls_token, pos_embed)]
    grad_bias, grad_cls, grad_pos = grads
    if bias is None and pos_embed is None:
        tokens = 1
    sums = None if bias is None else grad_out.new_empty((tokens, features), dtype=torch.float32)
    config = configuration("patch_embed_batch_sum", features, grad_out.dtype, defaults.patch_embed_batch_sum(batch))
    launch(
        patch_embed_batch_sum,
        (cdiv(tokens * features, config["BLOCK_N"]),),
        config,
        grad_ptr=grad_out,
        grad_batch=grad_out.stride(0),
        grad_row=grad_out.stride(1),
        cls_ptr=grad_cls,
        pos_ptr=grad_pos,
        sum_ptr=sums,
        batch=batch,
        tokens=tokens,
        features=features,
    )
    if sums is not None:
        sum_partials(sums[1:], features, grad_bias, None)
    return [g for g in grads if g is not None]


def resize_gradient(grad: Tensor, images: Tensor) -> Tensor:
    """The gradient of `images` (B, C, H, W) for that of the resized images, `grad`, contiguous and float32."""
    batch, channels, height, width = images.shape
    rows = grad.new_empty((batch, channels, height, grad.shape[3]))
    _resize_axis_gradient(grad, rows, height, grad.shape[2], grad.shape[3])
    out = images.new_empty(images.shape)
    _resize_axis_gradient(rows, out, width, grad.shape[3], 1)
    return out


def _resize_axis_gradient(grad: Tensor, out: Tensor, size: int, resized: int, inner: int) -> None:
    scale = size / resized
    config = defaults.RESIZE_AXIS_GRADIENT
    launch(
        resize_axis_gradient,
        (cdiv(out.numel(), config["BLOCK"]),),
        config,
        grad_ptr=grad,
        out_ptr=out,
        total=out.numel(),
        size=size,
        resized=resized,
        inner=inner,
        scale=scale,
        inverse_scale=1 / scale,
        candidates=math.ceil(4 / scale) + 4,
    )
