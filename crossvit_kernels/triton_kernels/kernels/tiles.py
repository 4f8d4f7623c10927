"""Loading tiles and vectors that may reach beyond their matrix, and where strided rows begin."""

import triton
import triton.language as tl


@triton.jit
def load_tile(pointers, rows_valid, columns_valid, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """A tile, zero where a mask that is needed is false."""
    if MASK_ROWS and MASK_COLUMNS:
        tile = tl.load(pointers, mask=rows_valid[:, None] & columns_valid[None, :], other=0.0)
    elif MASK_ROWS:
        tile = tl.load(pointers, mask=rows_valid[:, None], other=0.0)
    elif MASK_COLUMNS:
        tile = tl.load(pointers, mask=columns_valid[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_vector(pointer, offsets, valid, DEFAULT: tl.constexpr):
    """Elements of an optional vector in float32, DEFAULT where there is none."""
    if pointer is None:
        vector = tl.full(offsets.shape, DEFAULT, tl.float32)
    else:
        vector = tl.load(pointer + offsets, mask=valid, other=0.0).to(tl.float32)
    return vector


@triton.jit
def affine(x, norm_weight_ptr, norm_bias_ptr, columns, valid):
    """gamma x + beta, zero in columns that are not valid, where x has to be zero."""
    gamma = load_vector(norm_weight_ptr, columns, valid, 1.0)
    return x * gamma[None, :] + load_vector(norm_bias_ptr, columns, valid, 0.0)[None, :]


@triton.jit
def row_offsets(rows, tokens, batch_stride, row_stride):
    """Where these rows begin, see Rows."""
    rows = rows.to(tl.int64)
    batch = rows // tokens
    return batch * batch_stride + (rows - batch * tokens) * row_stride


@triton.jit
def scaled(value, scale_ptr, row, exists, rows_per_sample, column, counts, SCALE: tl.constexpr):
    """value (rows, columns), float32, times its factors; 1 is SAMPLE, 2 CHANNEL."""
    if SCALE == 1:
        value *= tl.load(scale_ptr + row // rows_per_sample, mask=exists, other=0.0).to(tl.float32)[:, None]
    if SCALE == 2:
        value *= tl.load(scale_ptr + column, mask=counts, other=0.0).to(tl.float32)[None, :]
    return value


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`COUNT` tiles to sum in."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    return tiles
