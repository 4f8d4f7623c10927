"""Patches of images, gathered from where the pixels lie and resized on the way.

A tile holds patches of one row of patches, of several images, so that what the resize knows about rows of pixels is a
scalar and what it knows about columns serves a whole tile:

    row r of BLOCK_M      patch r % columns of image r // columns, at the height of the program's row of patches
    column of BLOCK_K     a pixel of the patch; without a resize one of C * P * P in their order, with one of a band of
                          PY rows of PX >= P columns, of one channel
"""

import triton
import triton.language as tl


@triton.jit
def cubic_taps(at, scale, size, stride, INDEX: tl.constexpr):
    """Where torch's bicubic interpolation (A = -0.75) looks for the pixels `at`, and the weights that it gives."""
    source = tl.fma(at.to(tl.float32) + 0.5, scale, -0.5)
    below = tl.floor(source)
    t = source - below
    u = 1.0 - t
    tap = below.to(INDEX) - 1
    offsets = ()
    for i in tl.static_range(4):
        offsets = offsets + (tl.minimum(tl.maximum(tap + i, 0), size - 1) * stride,)
    return offsets, (_outer(t + 1.0), _inner(t), _inner(u), _outer(u + 1.0))


@triton.jit
def _inner(x):
    return (1.25 * x - 2.25) * x * x + 1.0


@triton.jit
def _outer(x):
    return ((-0.75 * x + 3.75) * x - 6.0) * x + 3.0


@triton.jit
def resized_line(line_ptr, image_at, x_offsets, x_weights):
    """A line of pixels of every patch, interpolated along the line."""
    line_ptr += image_at
    value = tl.load(line_ptr + x_offsets[0]).to(tl.float32) * x_weights[0]
    for i in tl.static_range(1, 4):
        value += tl.load(line_ptr + x_offsets[i]).to(tl.float32) * x_weights[i]
    return value


@triton.jit
def patch_rows(layout, tile, BLOCK_M: tl.constexpr):
    """Of the patches of a tile: their row of patches; which exist, in which image and in which column they are.

    Neighbouring tiles are neighbouring rows of patches of the same images.
    """
    row = tile // layout.lines * BLOCK_M + tl.arange(0, BLOCK_M)  # dividing 64 bits would take longer than the product
    image = row // layout.columns
    column = row - image * layout.columns
    return tile % layout.lines + tl.zeros((), tl.int64), row < layout.rows, image.to(tl.int64), column


@triton.jit
def resize_taps(images, exists, image, column, PATCH: tl.constexpr, PX: tl.constexpr):
    """What the patches of a tile have in common in all chunks: where their images begin, and the taps of their
    columns."""
    x = column[:, None] * PATCH + tl.arange(0, PX)[None, :]
    x_offsets, x_weights = cubic_taps(x, images.x_scale, images.width, images.column, tl.int32)
    return (tl.where(exists, image, 0) * images.batch)[:, None], x_offsets, x_weights


@triton.jit
def resized_tile(images, taps, chunk, y, PATCH: tl.constexpr, PX: tl.constexpr, PY: tl.constexpr,
                 BLOCK_M: tl.constexpr):  # fmt: skip
    """Chunk `chunk` of the resized patches that begin in row y of the resized images, (BLOCK_M, PY * PX), in the
    images' dtype; 0 beyond the patch."""
    image_at, x_offsets, x_weights = taps
    BANDS: tl.constexpr = (PATCH + PY - 1) // PY
    plane_ptr = images.base + (chunk // BANDS).to(tl.int64) * images.channel
    py = chunk % BANDS * PY
    lines = ()
    for p in tl.static_range(PY):
        y_offsets, y_weights = cubic_taps(y + (py + p), images.y_scale, images.height, images.row, tl.int64)
        line = resized_line(plane_ptr + y_offsets[0], image_at, x_offsets, x_weights) * y_weights[0]
        for i in tl.static_range(1, 4):
            line += resized_line(plane_ptr + y_offsets[i], image_at, x_offsets, x_weights) * y_weights[i]
        if PATCH % PY or PATCH != PX:
            line = tl.where((tl.arange(0, PX) < PATCH) & (py + p < PATCH), line, 0.0)
        lines = lines + (line.to(images.base.dtype.element_ty),)
    return _interleaved(lines, BLOCK_M, PX, PY)


@triton.jit
def _interleaved(lines, BLOCK_M: tl.constexpr, PX: tl.constexpr, PY: tl.constexpr):
    """PY lines (BLOCK_M, PX) one behind the other: each round joins those whose places differ in the highest bit."""
    HALF: tl.constexpr = PY // 2
    if PY >= 2:
        lines = _join_halves(lines, HALF)
    if PY >= 4:
        lines = _join_halves(lines, HALF // 2)
    if PY >= 8:
        lines = _join_halves(lines, HALF // 4)
    if PY >= 16:
        lines = _join_halves(lines, HALF // 8)
    tile = tl.reshape(lines[0], (BLOCK_M, PX, PY))
    return tl.reshape(tl.permute(tile, (0, 2, 1)), (BLOCK_M, PY * PX))


@triton.jit
def _join_halves(lines, HALF: tl.constexpr):
    joined = ()
    for p in tl.static_range(HALF):
        joined = joined + (tl.join(lines[p], lines[p + HALF]),)
    return joined


@triton.jit
def resized_pixels(chunk, PATCH: tl.constexpr, PX: tl.constexpr, PY: tl.constexpr):
    """Which pixels c * P * P + y * P + x of a resized patch chunk `chunk` holds, and which of them are inside it."""
    BANDS: tl.constexpr = (PATCH + PY - 1) // PY
    column = tl.arange(0, PX * PY)
    py = chunk % BANDS * PY + column // PX
    px = column % PX
    return (chunk // BANDS * PATCH + py) * PATCH + px, (py < PATCH) & (px < PATCH)


@triton.jit
def pixel_offsets(pixel, channel_stride, row_stride, column_stride, PATCH: tl.constexpr):
    """Where pixel c * P * P + y * P + x of a patch lies behind the patch's pixel 0."""
    channel = (pixel // (PATCH * PATCH)).to(tl.int64)
    inside = pixel % (PATCH * PATCH)
    return channel * channel_stride + (inside // PATCH).to(tl.int64) * row_stride + inside % PATCH * column_stride


@triton.jit
def patch_tile(images, exists, image, column, pixel, y, PATCH: tl.constexpr, DEPTH: tl.constexpr):
    """Pixels `pixel` of the patches in these images and columns of patches that begin in row y; 0 where there are
    none."""
    image_at = image * images.batch + column * PATCH * images.column
    at = images.base + y * images.row + image_at[:, None]
    at += pixel_offsets(pixel, images.channel, images.row, images.column, PATCH)[None, :]
    return tl.load(at, mask=exists[:, None] & (pixel < DEPTH)[None, :], other=0.0)
