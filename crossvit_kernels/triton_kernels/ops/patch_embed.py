"""patch_embed: a matrix product whose rows are patches, gathered, and where need be resized, as they are loaded. A
program holds the sums of all columns, so that it cuts out its patches once; positions and CLS tokens come with them."""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.arithmetic import product
from ..kernels.linear_gradients import sum_partials
from ..kernels.patches import (
    Images,
    cubic_taps,
    images_of,
    patch_rows,
    patch_tile,
    pixel_offsets,
    resized_pixels,
    resized_tile,
    row_blocks,
)
from ..kernels.resize_gradient import resize_gradient
from ..kernels.rows import block_of
from ..launch import DTYPES, Configuration, architecture, cdiv, configuration, dot_precision, launch, multiprocessors


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`COUNT` tiles to sum in."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    return tiles


@triton.jit
def multiply(accs, tile, weight_ptr, first_feature, pixel, inside, features, DEPTH: tl.constexpr, TILES: tl.constexpr,
             PRECISION: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The sums, one tile of columns after the other, and tile @ weight[:, pixel].T."""
    sums = ()
    for t in tl.static_range(TILES):
        feature = first_feature + t * BLOCK_N + tl.arange(0, BLOCK_N)
        wanted = (feature < features)[:, None] & inside[None, :]
        weight = tl.load(weight_ptr + feature[:, None] * DEPTH + pixel[None, :], mask=wanted, other=0.0)
        sums = sums + (product(tile, weight.T, accs[t], PRECISION),)
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
    line, exists, image, column = patch_rows(tl.program_id(0), rows, per_row, lines, BLOCK_M)
    first_feature = tl.program_id(1) * (TILES * BLOCK_N)
    accs = zeros(TILES, BLOCK_M, BLOCK_N)

    if RESIZE:
        x = column[:, None] * PATCH + tl.arange(0, PX)[None, :]
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
                accs, tile, weight_ptr, first_feature, pixel, inside, features, DEPTH, TILES, PRECISION, BLOCK_N
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
                accs, tile.to(weight_ptr.dtype.element_ty), weight_ptr, first_feature, pixel, pixel < DEPTH, features,
                DEPTH, TILES, PRECISION, BLOCK_N
            )  # fmt: skip

    token = 1 + line * per_row + column
    out_row = image * (1 + lines * per_row) * features
    for t in tl.static_range(TILES):
        feature = first_feature + t * BLOCK_N + tl.arange(0, BLOCK_N)
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


@triton.jit
def resized_patches(tile, chunk, images_ptr, image_batch, image_channel, image_row, image_column, in_height, in_width,
                    y_scale, x_scale, rows, per_row, lines, CHANNELS: tl.constexpr, PATCH: tl.constexpr,
                    BLOCK_M: tl.constexpr, PX: tl.constexpr, PY: tl.constexpr):  # fmt: skip
    """Chunk `chunk` of the resized patches of a tile, 0 where there are none."""
    line, exists, image, column = patch_rows(tile, rows, per_row, lines, BLOCK_M)
    x = column[:, None] * PATCH + tl.arange(0, PX)[None, :]
    x_offsets, x_weights = cubic_taps(x, x_scale, in_width, image_column, tl.int32)
    image_at = (tl.where(exists, image, 0) * image_batch)[:, None]
    pixels = resized_tile(
        images_ptr, image_at, x_offsets, x_weights, chunk, line * PATCH, image_channel, image_row, in_height, y_scale,
        CHANNELS, PATCH, PX, PY, BLOCK_M
    )  # fmt: skip
    return tl.where(exists[:, None], pixels, 0.0)


@triton.jit
def patch_embed_weight_gradient(
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
    grad_ptr,
    grad_batch,
    grad_row,
    out_ptr,
    features,
    row_tiles,
    tiles_per_piece,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    RESIZE: tl.constexpr,
    TILES: tl.constexpr,
    CHUNKS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PX: tl.constexpr,
):
    """grad^T patches over a piece of the tiles of patches, for a chunk of their pixels: out (pieces, D, C * P * P)."""
    DEPTH: tl.constexpr = CHANNELS * PATCH * PATCH
    PY: tl.constexpr = BLOCK_K // PX
    chunk = tl.program_id(0) % CHUNKS
    piece = tl.program_id(0) // CHUNKS
    begin = piece * tiles_per_piece
    end = tl.minimum(begin + tiles_per_piece, row_tiles)
    first_feature = tl.program_id(1) * (TILES * BLOCK_N)
    accs = zeros(TILES, BLOCK_N, BLOCK_K)
    if RESIZE:
        pixel, inside = resized_pixels(chunk, PATCH, PX, PY)
        patches = resized_patches(
            begin, chunk, images_ptr, image_batch, image_channel, image_row, image_column, in_height, in_width,
            y_scale, x_scale, rows, per_row, lines, CHANNELS, PATCH, BLOCK_M, PX, PY
        ).to(COMPUTE)  # fmt: skip
    else:
        pixel = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = pixel < DEPTH
    for tile in tl.range(begin, end):
        line, exists, image, column = patch_rows(tile, rows, per_row, lines, BLOCK_M)
        if not RESIZE:
            image_at = image * image_batch + column * PATCH * image_column
            patches = patch_tile(
                images_ptr, image_at, exists, pixel, line * PATCH, image_channel, image_row, image_column, PATCH, DEPTH
            ).to(COMPUTE)
        grad_at = grad_ptr + image * grad_batch + (1 + line * per_row + column) * grad_row
        sums = ()
        for t in tl.static_range(TILES):
            feature = first_feature + t * BLOCK_N + tl.arange(0, BLOCK_N)
            wanted = exists[:, None] & (feature < features)[None, :]
            grad = tl.load(grad_at[:, None] + feature[None, :], mask=wanted, other=0.0).to(COMPUTE)
            sums = sums + (product(grad.T, patches, accs[t], PRECISION),)
        accs = sums
        if RESIZE:  # the next tile, while the matrix units work on this one
            patches = resized_patches(
                tl.minimum(tile + 1, end - 1), chunk, images_ptr, image_batch, image_channel, image_row, image_column,
                in_height, in_width, y_scale, x_scale, rows, per_row, lines, CHANNELS, PATCH, BLOCK_M, PX, PY
            ).to(COMPUTE)  # fmt: skip
    for t in tl.static_range(TILES):
        feature = first_feature + t * BLOCK_N + tl.arange(0, BLOCK_N)
        at = (piece.to(tl.int64) * features + feature)[:, None] * DEPTH + pixel[None, :]
        wanted = (feature < features)[:, None] & inside[None, :]
        tl.store(out_ptr + at, accs[t].to(out_ptr.dtype.element_ty), mask=wanted)


@triton.jit
def patch_embed_images_gradient(
    grad_ptr,
    grad_batch,
    grad_row,
    weight_ptr,
    out_ptr,
    rows,
    per_row,
    lines,
    features,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """grad weight, each pixel to its place in out (B, C, H, W)."""
    DEPTH: tl.constexpr = CHANNELS * PATCH * PATCH
    line, exists, image, column = patch_rows(tl.program_id(0), rows, per_row, lines, BLOCK_M)
    pixel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = pixel < DEPTH
    grad_at = grad_ptr + image * grad_batch + (1 + line * per_row + column) * grad_row
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, features, BLOCK_K):
        feature = k + tl.arange(0, BLOCK_K)
        counts = feature < features
        grad = tl.load(grad_at[:, None] + feature[None, :], mask=exists[:, None] & counts[None, :], other=0.0)
        weight_at = weight_ptr + feature[:, None] * DEPTH + pixel[None, :]
        weight = tl.load(weight_at, mask=counts[:, None] & inside[None, :], other=0.0)
        acc = product(grad.to(weight_ptr.dtype.element_ty), weight, acc, PRECISION)
    out_row = per_row * PATCH
    out_plane = lines * PATCH * out_row
    at = image * CHANNELS * out_plane + line * PATCH * out_row + column * PATCH
    at = at[:, None] + pixel_offsets(pixel, out_plane, out_row, 1, PATCH)[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=exists[:, None] & inside[None, :])


@triton.jit
def patch_embed_batch_sum(
    grad_ptr,
    grad_batch,
    grad_row,
    cls_ptr,
    pos_ptr,
    sum_ptr,
    batch,
    tokens,
    features,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sum of grad over the batch, (tokens, D), to pos_ptr, in float32 to sum_ptr, and its row 0 to cls_ptr."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = at < tokens * features
    grad_at = grad_ptr + at // features * grad_row + at % features
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, batch, BLOCK_M):
        image = start + tl.arange(0, BLOCK_M).to(tl.int64)
        wanted = (image < batch)[:, None] & inside[None, :]
        total += tl.load(grad_at[None, :] + (image * grad_batch)[:, None], mask=wanted, other=0.0).to(tl.float32)
    result = tl.sum(total, 0)
    if cls_ptr is not None:
        tl.store(cls_ptr + at, result.to(cls_ptr.dtype.element_ty), mask=at < features)
    if pos_ptr is not None:
        tl.store(pos_ptr + at, result.to(pos_ptr.dtype.element_ty), mask=inside)
    if sum_ptr is not None:
        tl.store(sum_ptr + at, result, mask=inside)


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
    config = cut.blocks(_forward_configuration(features, weight.dtype, cut.resize))
    most = max(config.pop("BLOCK_D") // config["BLOCK_N"], 1)
    row_tiles, column_tiles = cut.lines * row_blocks(cut, config), cdiv(features, config["BLOCK_N"])
    tiles = tiles_per_program(row_tiles, column_tiles, most, multiprocessors())
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
    config = cut.blocks(_weight_configuration(features, weight.dtype, cut.resize))
    chunks = channels * cdiv(patch, config["PX"]) * cdiv(patch, config["BLOCK_K"] // config["PX"])
    if not cut.resize:
        chunks = cdiv(channels * patch * patch, config["BLOCK_K"])
    tiles = min(max(config.pop("BLOCK_D") // config["BLOCK_N"], 1), cdiv(features, config["BLOCK_N"]))
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
    float32 = weight.dtype.itemsize == 4
    default = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16 if float32 else 64, "num_warps": 4, "num_stages": 3}
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
    block_m = min(16, triton.next_power_of_2(batch))
    default = {"BLOCK_M": block_m, "BLOCK_N": 2048 // block_m, "num_warps": 4, "num_stages": 2}
    config = configuration("patch_embed_batch_sum", features, grad_out.dtype, default)
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


@functools.cache
def tiles_per_program(row_tiles: int, column_tiles: int, most: int, processors: int) -> int:
    """How many tiles of columns a program takes: gathering its rows costs about as much as two of them."""
    return min(
        range(min(most, column_tiles), 0, -1),
        key=lambda tiles: cdiv(row_tiles * cdiv(column_tiles, tiles), processors) * (tiles + 2),
    )


def _forward_configuration(features: int, dtype: torch.dtype, resize: bool) -> Configuration:
    """BLOCK_D is the most columns that a program takes."""
    name = "patch_embed_forward_resized" if resize else "patch_embed_forward"
    if dtype.itemsize == 4:
        default = {"BLOCK_N": block_of(features, 64), "BLOCK_D": 128 if resize else 192, "BLOCK_K": 16, "num_stages": 3}
    else:
        default = {"BLOCK_N": block_of(features), "BLOCK_D": 384, "BLOCK_K": 32, "num_stages": 4}
    # A thread of 16 warps has registers left for the taps of a resize beside its part of 384 columns; tcgen05, whose
    # sums are not in registers, takes 8 at most.
    many = resize and dtype.itemsize == 2 and features > 256 and architecture() in ("sm_80", "sm_90")
    num_warps = 16 if many else 8
    return configuration(name, features, dtype, {"BLOCK_M": 64, **default, "num_warps": num_warps})


def _weight_configuration(features: int, dtype: torch.dtype, resize: bool) -> Configuration:
    name = "patch_embed_weight_gradient_resized" if resize else "patch_embed_weight_gradient"
    block_n = block_of(features, 128 if resize and dtype.itemsize == 2 else 64)
    default = {"BLOCK_M": 32, "BLOCK_N": block_n, "BLOCK_D": 192, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}
    if dtype.itemsize == 4:
        narrow = {"BLOCK_D": 64, "num_warps": 4} if dot_precision(dtype) == "tf32" else {"BLOCK_D": 32, "num_warps": 8}
        default |= {"BLOCK_M": 16, "BLOCK_K": 64, **narrow}
    if resize:
        default |= {"BLOCK_K": 32, "BLOCK_D": 384 if dtype.itemsize == 2 else 192}
    return configuration(name, features, dtype, default)
