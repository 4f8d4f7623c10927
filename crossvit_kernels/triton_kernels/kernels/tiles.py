"""Loading tiles and vectors that may reach beyond their matrix, and where strided rows begin."""

import triton
import triton.language as tl

from ..tiling import ragged


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
def load_columns(starts, valid, columns, WIDTH: tl.constexpr):
    """These columns, a block of them, of the rows that begin at `starts`; zero in rows that are not valid and beyond
    WIDTH."""
    return load_tile(starts[:, None] + columns[None, :], valid, columns < WIDTH, True, ragged(WIDTH, columns.shape[0]))


@triton.jit
def load_inside(starts, exists, columns, counts):
    """These columns, of which only some count, of rows that begin at `starts`; zero elsewhere."""
    return tl.load(starts[:, None] + columns[None, :], mask=exists[:, None] & counts[None, :], other=0.0)


@triton.jit
def store_inside(starts, exists, columns, counts, values):
    """Stores values (rows, columns) to rows that begin at `starts`, as far as rows exist and columns count."""
    at = starts[:, None] + columns[None, :]
    tl.store(at, values.to(at.dtype.element_ty), mask=exists[:, None] & counts[None, :])


@triton.jit
def load_rows(starts, valid, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """The rows that begin at `starts`, as chunks of BLOCK_K columns."""
    chunks: tl.tuple = ()
    for k in tl.static_range(0, WIDTH, BLOCK_K):
        chunks = chunks + (load_columns(starts, valid, k + tl.arange(0, BLOCK_K), WIDTH),)
    return chunks


@triton.jit
def load_head(weight_ptr, head, j, columns, D: tl.constexpr, HEAD: tl.constexpr):
    """Of a projection's weight (D, D) the rows j among a head's own HEAD, in these columns; zero beyond either."""
    at = weight_ptr + (head * HEAD + j)[:, None] * D + columns[None, :]
    return load_tile(at, j < HEAD, columns < D, ragged(HEAD, j.shape[0]), ragged(D, columns.shape[0]))


@triton.jit
def load_vector(pointer, offsets, valid):
    """Elements of an optional vector in float32, zero where there is none."""
    if pointer is None:
        vector = tl.zeros(offsets.shape, tl.float32)
    else:
        vector = tl.load(pointer + offsets, mask=valid, other=0.0).to(tl.float32)
    return vector


@triton.jit
def within(x, columns, WIDTH: tl.constexpr):
    """x (rows, columns), a block of columns; zero beyond WIDTH."""
    if ragged(WIDTH, columns.shape[0]):
        x = tl.where((columns < WIDTH)[None, :], x, 0.0)
    return x


@triton.jit
def row_starts(x, rows):
    """Where these rows of x, see `Rows`, begin."""
    rows = rows.to(tl.int64)
    batch = rows // x.tokens
    return x.base + (batch * x.batch + (rows - batch * x.tokens) * x.row)


@triton.jit
def scaled(value, scale, row, exists, column, counts):
    """value (rows, columns), float32, times its factors, see `Scale`."""
    if scale.sample is not None:
        value *= tl.load(scale.sample + row // scale.rows, mask=exists, other=0.0).to(tl.float32)[:, None]
    if scale.channel is not None:
        value *= tl.load(scale.channel + column, mask=counts, other=0.0).to(tl.float32)[None, :]
    return value


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`COUNT` tiles to sum in."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    return tiles
