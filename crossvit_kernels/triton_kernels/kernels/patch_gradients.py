"""The gradients of patch_embed: of the weight, of the images, and sums over the batch."""

import triton
import triton.language as tl

from .arithmetic import product
from .patches import patch_rows, patch_tile, pixel_offsets, resize_taps, resized_pixels, resized_tile
from .tiles import load_inside, store_inside, zeros


@triton.jit
def resized_patches(images, layout, tile, chunk, PATCH: tl.constexpr, BLOCK_M: tl.constexpr, PX: tl.constexpr,
                    PY: tl.constexpr):  # fmt: skip
    """Chunk `chunk` of the resized patches of a tile, 0 where there are none."""
    line, exists, image, column = patch_rows(layout, tile, BLOCK_M)
    taps = resize_taps(images, exists, image, column, PATCH, PX)
    pixels = resized_tile(images, taps, chunk, line * PATCH, PATCH, PX, PY, BLOCK_M)
    return tl.where(exists[:, None], pixels, 0.0)


@triton.jit
def token_starts(grad, layout, line, image, column):
    """Where the gradients of these patches' tokens begin; grad (B, 1 + N, D)."""
    return grad.base + image * grad.batch + (1 + line * layout.columns + column) * grad.row


@triton.jit
def patch_embed_weight_gradient(
    images, layout, grad, out_ptr, features, row_tiles, tiles_per_piece,
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, RESIZE: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PX: tl.constexpr,
):  # fmt: skip
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
        patches = resized_patches(images, layout, begin, chunk, PATCH, BLOCK_M, PX, PY).to(COMPUTE)
    else:
        pixel = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = pixel < DEPTH
    for tile in tl.range(begin, end):
        line, exists, image, column = patch_rows(layout, tile, BLOCK_M)
        if not RESIZE:
            patches = patch_tile(images, exists, image, column, pixel, line * PATCH, PATCH, DEPTH).to(COMPUTE)
        grad_at = token_starts(grad, layout, line, image, column)
        sums = ()
        for t in tl.static_range(TILES):
            feature = first_feature + t * BLOCK_N + tl.arange(0, BLOCK_N)
            grads = load_inside(grad_at, exists, feature, feature < features).to(COMPUTE)
            sums = sums + (product(grads.T, patches, accs[t], PRECISION),)
        accs = sums
        if RESIZE:  # the next tile, while the matrix units work on this one
            following = tl.minimum(tile + 1, end - 1)
            patches = resized_patches(images, layout, following, chunk, PATCH, BLOCK_M, PX, PY).to(COMPUTE)
    for t in tl.static_range(TILES):
        feature = first_feature + t * BLOCK_N + tl.arange(0, BLOCK_N)
        to = out_ptr + (piece.to(tl.int64) * features + feature) * DEPTH
        store_inside(to, feature < features, pixel, inside, accs[t])


@triton.jit
def patch_embed_images_gradient(
    layout, grad, weight_ptr, out_ptr, features,
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad weight, each pixel to its place in out (B, C, H, W)."""
    DEPTH: tl.constexpr = CHANNELS * PATCH * PATCH
    line, exists, image, column = patch_rows(layout, tl.program_id(0), BLOCK_M)
    pixel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = pixel < DEPTH
    grad_at = token_starts(grad, layout, line, image, column)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, features, BLOCK_K):
        feature = k + tl.arange(0, BLOCK_K)
        counts = feature < features
        grads = load_inside(grad_at, exists, feature, counts)
        weight = load_inside(weight_ptr + feature * DEPTH, counts, pixel, inside)
        acc = product(grads.to(weight_ptr.dtype.element_ty), weight, acc, PRECISION)
    out_row = layout.columns * PATCH
    out_plane = layout.lines * PATCH * out_row
    at = image * CHANNELS * out_plane + line * PATCH * out_row + column * PATCH
    at = at[:, None] + pixel_offsets(pixel, out_plane, out_row, 1, PATCH)[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=exists[:, None] & inside[None, :])


@triton.jit
def patch_embed_batch_sum(
    grad, cls_ptr, pos_ptr, sum_ptr, batch, tokens, features, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The sum of grad over the batch, (tokens, D), to pos_ptr, in float32 to sum_ptr, and its row 0 to cls_ptr."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = at < tokens * features
    grad_at = grad.base + at // features * grad.row + at % features
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, batch, BLOCK_M):
        image = start + tl.arange(0, BLOCK_M).to(tl.int64)
        wanted = (image < batch)[:, None] & inside[None, :]
        total += tl.load(grad_at[None, :] + (image * grad.batch)[:, None], mask=wanted, other=0.0).to(tl.float32)
    result = tl.sum(total, 0)
    if cls_ptr is not None:
        tl.store(cls_ptr + at, result.to(cls_ptr.dtype.element_ty), mask=at < features)
    if pos_ptr is not None:
        tl.store(pos_ptr + at, result.to(pos_ptr.dtype.element_ty), mask=inside)
    if sum_ptr is not None:
        tl.store(sum_ptr + at, result, mask=inside)
