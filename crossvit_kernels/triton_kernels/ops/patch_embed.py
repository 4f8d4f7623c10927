"""patch_embed: a matrix product whose rows are patches, gathered, and where need be resized, as they are loaded. A
program holds the sums of all columns, so that it cuts out its patches once; positions and CLS tokens come with them."""

import math
from typing import Any

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
from ..views import Cut, Linear, Rows, contiguous, patches_of, tokens_of
from .linear import sum_partials


def forward(call: Any) -> Tensor:
    """out of the op, which saves nothing."""
    images, weight = call.images, call.weight
    features, patch = weight.shape[0], weight.shape[3]
    patches = patches_of(images, call.height, call.width, patch)
    dtype = torch.promote_types(torch.promote_types(weight.dtype, call.cls_token.dtype), call.pos_embed.dtype)
    out = images.new_empty((images.shape[0], *call.pos_embed.shape[1:]), dtype=dtype)
    name = "patch_embed_forward_resized" if patches.resize else "patch_embed_forward"
    default = defaults.patch_embed(features, weight.dtype, patches.resize, architecture())
    config = patches.fitted(configuration(name, features, weight.dtype, default))
    most = max(config["BLOCK_D"] // config["BLOCK_N"], 1)
    row_tiles, column_tiles = patches.tiles(config), cdiv(features, config["BLOCK_N"])
    tiles = tiles_per_program(row_tiles, column_tiles, most, multiprocessors())
    launch(
        patch_embed_forward,
        (row_tiles, cdiv(column_tiles, tiles)),
        config,
        patches.arguments(),
        linear=Linear(contiguous(weight), contiguous(call.bias)),
        cls_ptr=contiguous(call.cls_token),
        pos_ptr=contiguous(call.pos_embed),
        out_ptr=out,
        features=features,
        TILES=tiles,
        PRECISION=dot_precision(weight.dtype),
    )
    return out


def backward(call: Any) -> list[Tensor]:
    """The gradients of images, weight, bias, cls_token and pos_embed that are needed."""
    images, weight, needs = call.images, call.weight, call.needs
    grad = tokens_of(call.grad_out).uncounted()
    patches = patches_of(images, call.height, call.width, weight.shape[3])
    grads: list[Tensor] = []
    if needs[0]:
        grads.append(_images_gradient(grad, patches, images, weight))
    if needs[1]:
        grads.append(_weight_gradient(grad, patches, weight))
    if any(needs[2:]):
        wanted = [t if needed else None for t, needed in zip((call.bias, call.cls_token, call.pos_embed), needs[2:])]
        grads += _batch_sums(grad, *wanted)
    return grads


def _weight_gradient(grad: Rows, cut: Cut, weight: Tensor) -> Tensor:
    features, channels, patch, _ = weight.shape
    out = weight.new_empty(weight.shape)
    name = "patch_embed_weight_gradient_resized" if cut.resize else "patch_embed_weight_gradient"
    default = defaults.patch_embed_weight_gradient(features, weight.dtype, cut.resize, dot_precision(weight.dtype))
    config = cut.fitted(configuration(name, features, weight.dtype, default))
    chunks = channels * cdiv(patch, config["PX"]) * cdiv(patch, config["BLOCK_K"] // config["PX"])
    if not cut.resize:
        chunks = cdiv(channels * patch * patch, config["BLOCK_K"])
    tiles = min(max(config["BLOCK_D"] // config["BLOCK_N"], 1), cdiv(features, config["BLOCK_N"]))
    columns = cdiv(features, tiles * config["BLOCK_N"])
    row_tiles = cut.tiles(config)
    per_piece = cdiv(row_tiles, max(1, min(2 * multiprocessors() // (chunks * columns), row_tiles // 4)))
    pieces = cdiv(row_tiles, per_piece)
    partial = out if pieces == 1 else out.new_empty((pieces, out.numel()), dtype=torch.float32)
    launch(
        patch_embed_weight_gradient,
        (chunks * pieces, columns),
        config,
        cut.arguments(),
        grad=grad,
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
        sum_partials(partial, out.numel(), out, None)
    return out


def _images_gradient(grad: Rows, cut: Cut, images: Tensor, weight: Tensor) -> Tensor:
    features, channels, patch, _ = weight.shape
    dtype = torch.float32 if cut.resize else images.dtype
    size = cut.layout.lines * patch, cut.layout.columns * patch
    out = images.new_empty((images.shape[0], channels, *size), dtype=dtype)
    default = defaults.patch_embed_images_gradient(weight.dtype)
    config = configuration("patch_embed_images_gradient", features, weight.dtype, default)
    launch(
        patch_embed_images_gradient,
        (cut.tiles(config), cdiv(channels * patch * patch, config["BLOCK_N"])),
        config,
        cut.arguments(),
        grad=grad,
        weight_ptr=weight.contiguous(),
        out_ptr=out,
        features=features,
        PRECISION=dot_precision(weight.dtype),
    )
    return resize_gradient(out, images) if cut.resize else out


def _batch_sums(grad: Rows, bias: Tensor | None, cls_token: Tensor | None, pos_embed: Tensor | None) -> list[Tensor]:
    """The gradients of those that are given."""
    batch, tokens, features = grad.base.shape
    grads = [None if t is None else t.new_empty(t.shape) for t in (bias, cls_token, pos_embed)]
    grad_bias, grad_cls, grad_pos = grads
    if bias is None and pos_embed is None:
        tokens = 1
    sums = None if bias is None else grad.base.new_empty((tokens, features), dtype=torch.float32)
    config = configuration("patch_embed_batch_sum", features, grad.base.dtype, defaults.patch_embed_batch_sum(batch))
    grid, sizes = (
        (cdiv(tokens * features, config["BLOCK_N"]),),
        {"batch": batch, "tokens": tokens, "features": features},
    )
    launch(patch_embed_batch_sum, grid, config, sizes, grad=grad, cls_ptr=grad_cls, pos_ptr=grad_pos, sum_ptr=sums)
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
    scale, config = size / resized, defaults.RESIZE_AXIS_GRADIENT
    sizes = {"total": out.numel(), "size": size, "resized": resized, "inner": inner}
    scales = {"scale": scale, "inverse_scale": 1 / scale, "candidates": math.ceil(4 / scale) + 4}
    launch(
        resize_axis_gradient, (cdiv(out.numel(), config["BLOCK"]),), config, sizes, grad_ptr=grad, out_ptr=out, **scales
    )
