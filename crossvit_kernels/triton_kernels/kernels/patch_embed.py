"""A matrix product whose rows are patches, gathered, and where need be resized, as they are loaded. A program holds
the sums of all columns, so that it cuts out its patches once; positions and CLS tokens come with them."""

import triton
import triton.language as tl

from .arithmetic import product
from .patches import patch_rows, patch_tile, resize_taps, resized_pixels, resized_tile
from .tiles import load_inside, zeros


@triton.jit
def multiply(accs, tile, weight_ptr, first_feature, pixel, inside, features, DEPTH: tl.constexpr,
             PRECISION: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The sums, one tile of columns after the other, and tile @ weight[:, pixel].T."""
    sums = ()
    for t in tl.static_range(len(accs)):
        feature = first_feature + t * BLOCK_N + tl.arange(0, BLOCK_N)
        weight = load_inside(weight_ptr + feature * DEPTH, feature < features, pixel, inside)
        sums = sums + (product(tile, weight.T, accs[t], PRECISION),)
    return sums


@triton.jit
def patch_embed_forward(
    images, layout, linear, cls_ptr, pos_ptr, out_ptr, features,
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, RESIZE: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PX: tl.constexpr,
):  # fmt: skip
    """[cls || patches weight^T + bias] + pos, of BLOCK_M patches and TILES tiles of columns."""
    DEPTH: tl.constexpr = CHANNELS * PATCH * PATCH
    PY: tl.constexpr = BLOCK_K // PX
    line, exists, image, column = patch_rows(layout, tl.program_id(0), BLOCK_M)
    first_feature = tl.program_id(1) * (TILES * BLOCK_N)
    accs = zeros(TILES, BLOCK_M, BLOCK_N)

    dtype: tl.constexpr = linear.weight.dtype.element_ty
    if RESIZE:
        taps = resize_taps(images, exists, image, column, PATCH, PX)
        # The next chunk is gathered while the matrix units work on this one.
        CHUNKS: tl.constexpr = CHANNELS * ((PATCH + PY - 1) // PY)
        first = tl.program_id(0) * 0
        tile = resized_tile(images, taps, first, line * PATCH, PATCH, PX, PY, BLOCK_M).to(dtype)
        for chunk in tl.range(0, CHUNKS):
            pixel, inside = resized_pixels(chunk, PATCH, PX, PY)
            accs = multiply(
                accs, tile, linear.weight, first_feature, pixel, inside, features, DEPTH, PRECISION, BLOCK_N
            )
            following = tl.minimum(chunk + 1, CHUNKS - 1)
            tile = resized_tile(images, taps, following, line * PATCH, PATCH, PX, PY, BLOCK_M).to(dtype)
    else:
        for k in tl.range(0, DEPTH, BLOCK_K):
            pixel = k + tl.arange(0, BLOCK_K)
            tile = patch_tile(images, exists, image, column, pixel, line * PATCH, PATCH, DEPTH).to(dtype)
            accs = multiply(
                accs, tile, linear.weight, first_feature, pixel, pixel < DEPTH, features, DEPTH, PRECISION, BLOCK_N
            )

    token = 1 + line * layout.columns + column
    out_row = image * (1 + layout.lines * layout.columns) * features
    for t in tl.static_range(TILES):
        feature = first_feature + t * BLOCK_N + tl.arange(0, BLOCK_N)
        counts = feature < features
        value = accs[t]
        if linear.bias is not None:
            value += tl.load(linear.bias + feature, mask=counts, other=0.0).to(tl.float32)[None, :]
        value = value.to(dtype).to(tl.float32)  # as a convolution's result is
        at = (token * features)[:, None] + feature[None, :]
        wanted = exists[:, None] & counts[None, :]
        value += tl.load(pos_ptr + at, mask=wanted, other=0.0).to(tl.float32)
        tl.store(out_ptr + out_row[:, None] + at, value.to(out_ptr.dtype.element_ty), mask=wanted)
        if line == 0:
            cls = tl.load(cls_ptr + feature, mask=counts, other=0.0).to(tl.float32)
            cls += tl.load(pos_ptr + feature, mask=counts, other=0.0).to(tl.float32)
            cls = tl.broadcast_to(cls.to(out_ptr.dtype.element_ty)[None, :], (BLOCK_M, BLOCK_N))
            tl.store(out_ptr + out_row[:, None] + feature[None, :], cls, mask=wanted & (column == 0)[:, None])
