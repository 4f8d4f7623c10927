"""patch_embed: a matrix product whose rows are patches, gathered, and where need be resized, as they are loaded. A
program holds the sums of all columns, so that it cuts out its patches once; positions and CLS tokens come with them."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Configuration, cdiv, configuration, dot_precision, launch, multiprocessors
from ._patches import (
    cubic_taps,
    images_of,
    patch_tile,
    resized_pixels,
    resized_tile,
    row_blocks,
)
from ._rows import block_of


@triton.jit
def multiply(accs, tile, weight_ptr, first, pixel, inside, features, DEPTH: tl.constexpr, TILES: tl.constexpr,
             PRECISION: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The sums, one tile of columns after the other, and tile @ weight[:, pixel].T."""
    sums = ()
    for t in tl.static_range(TILES):
        feature = first + t * BLOCK_N + tl.arange(0, BLOCK_N)
        wanted = (feature < features)[:, None] & inside[None, :]
        weight = tl.load(weight_ptr + feature[:, None] * DEPTH + pixel[None, :], mask=wanted, other=0.0)
        sums = sums + (tl.dot(tile, weight.T, accs[t], input_precision=PRECISION),)
    return sums


@triton.jit
def patch_embed_forward(
    images_ptr,
    image_batch,
    image_channel,
    image_row,
    image_column,
    in_height,
    in_width,
    y_scale,
    x_scale,
    rows,
    per_row,
    lines,
    weight_ptr,
    bias_ptr,
    cls_ptr,
    pos_ptr,
    out_ptr,
    features,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    RESIZE: tl.constexpr,
    TILES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PX: tl.constexpr,
):
    DEPTH: tl.constexpr = CHANNELS * PATCH * PATCH
    PY: tl.constexpr = BLOCK_K // PX
    # Neighbouring programs take neighbouring rows of patches of the same images.
    line = tl.program_id(0).to(tl.int64) % lines
    row = tl.program_id(0).to(tl.int64) // lines * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < rows
    image = row // per_row
    column = row - image * per_row
    first = tl.program_id(1) * (TILES * BLOCK_N)
    accs = ()
    for _ in tl.static_range(TILES):
        accs = accs + (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)

    if RESIZE:
        x = column.to(tl.int32)[:, None] * PATCH + tl.arange(0, PX)[None, :]
        x_offsets, x_weights = cubic_taps(x, x_scale, in_width, image_column, tl.int32)
        image_at = (tl.where(exists, image, 0) * image_batch)[:, None]
        # The next chunk is gathered while the matrix units work on this one.
        CHUNKS: tl.constexpr = CHANNELS * ((PATCH + PY - 1) // PY)
        tile = resized_tile(
            images_ptr, image_at, x_offsets, x_weights, tl.program_id(0) * 0, line * PATCH, image_channel, image_row,
            in_height, y_scale, CHANNELS, PATCH, PX, PY, BLOCK_M
        )  # fmt: skip
        tile = tile.to(weight_ptr.dtype.element_ty)
        for chunk in tl.range(0, CHUNKS):
            pixel, inside = resized_pixels(chunk, PATCH, PX, PY)
            accs = multiply(
                accs, tile, weight_ptr, first, pixel, inside, features, DEPTH, TILES, PRECISION, BLOCK_N
            )  # fmt: skip
            tile = resized_tile(
                images_ptr, image_at, x_offsets, x_weights, tl.minimum(chunk + 1, CHUNKS - 1), line * PATCH,
                image_channel, image_row, in_height, y_scale, CHANNELS, PATCH, PX, PY, BLOCK_M
            )  # fmt: skip
            tile = tile.to(weight_ptr.dtype.element_ty)
    else:
        image_at = image * image_batch + column * PATCH * image_column
        for k in tl.range(0, DEPTH, BLOCK_K):
            pixel = k + tl.arange(0, BLOCK_K)
            tile = patch_tile(
                images_ptr, image_at, exists, pixel, line * PATCH, image_channel, image_row, image_column, PATCH, DEPTH
            )
            accs = multiply(
                accs, tile.to(weight_ptr.dtype.element_ty), weight_ptr, first, pixel, pixel < DEPTH, features,
                DEPTH, TILES, PRECISION, BLOCK_N
            )  # fmt: skip

    token = 1 + line * per_row + column
    out_row = image * (1 + lines * per_row) * features
    for t in tl.static_range(TILES):
        feature = first + t * BLOCK_N + tl.arange(0, BLOCK_N)
        counts = feature < features
        value = accs[t]
        if bias_ptr is not None:
            value += tl.load(bias_ptr + feature, mask=counts, other=0.0).to(tl.float32)[None, :]
        value = value.to(weight_ptr.dtype.element_ty).to(tl.float32)  # as a convolution's result is
        at = (token * features)[:, None] + feature[None, :]
        wanted = exists[:, None] & counts[None, :]
        value += tl.load(pos_ptr + at, mask=wanted, other=0.0).to(tl.float32)
        tl.store(out_ptr + out_row[:, None] + at, value.to(out_ptr.dtype.element_ty), mask=wanted)
        if line == 0:
            cls = tl.load(cls_ptr + feature, mask=counts, other=0.0).to(tl.float32)
            cls += tl.load(pos_ptr + feature, mask=counts, other=0.0).to(tl.float32)
            cls = tl.broadcast_to(cls.to(out_ptr.dtype.element_ty)[None, :], (BLOCK_M, BLOCK_N))
            tl.store(out_ptr + out_row[:, None] + feature[None, :], cls, mask=wanted & (column == 0)[:, None])


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
    config = cut.blocks(_forward_configuration(features, weight.dtype))
    share = config.pop("TILES")
    row_tiles, column_tiles = cut.lines * row_blocks(cut, config), cdiv(features, config["BLOCK_N"])
    tiles = tiles_per_program(row_tiles, column_tiles, share, multiprocessors())
    launch(
        patch_embed_forward,
        (row_tiles, cdiv(column_tiles, tiles)),
        config,
        **cut.arguments(),
        weight_ptr=weight.contiguous(),
        bias_ptr=None if bias is None else bias.contiguous(),
        cls_ptr=cls_token.contiguous(),
        pos_ptr=pos_embed.contiguous(),
        out_ptr=out,
        features=features,
        TILES=tiles,
        PRECISION=dot_precision(weight.dtype),
    )
    return out


@functools.cache
def tiles_per_program(row_tiles: int, column_tiles: int, most: int, processors: int) -> int:
    """How many tiles of columns a program takes: gathering its rows costs about as much as two of them."""
    return min(
        range(min(most, column_tiles), 0, -1),
        key=lambda tiles: cdiv(row_tiles * cdiv(column_tiles, tiles), processors) * (tiles + 2),
    )


def _forward_configuration(features: int, dtype: torch.dtype) -> Configuration:
    if dtype.itemsize == 4:
        block_n = block_of(features, 64)
        default = {"BLOCK_N": block_n, "BLOCK_K": 16, "TILES": max(256 // block_n, 1), "num_stages": 3}
    else:
        block_n = block_of(features)
        default = {"BLOCK_N": block_n, "BLOCK_K": 32, "TILES": max(384 // block_n, 1), "num_stages": 4}
    return configuration("patch_embed_forward", features, dtype, {"BLOCK_M": 64, **default, "num_warps": 8})
