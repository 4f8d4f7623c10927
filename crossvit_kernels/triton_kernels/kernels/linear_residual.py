"""A tiled matrix product whose last step adds bias, scale and residual, and the gradient of the scale."""

import triton
import triton.language as tl

from .arithmetic import gelu, product
from .tiles import load_inside, row_starts, scaled, store_inside


@triton.jit
def linear_tile(
    x, linear, row, exists, feature, counts, width,
    GELU: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(rows, features) of x weight^T + bias, or of gelu(x), float32."""
    chunk = tl.arange(0, BLOCK_K)
    x_at = row_starts(x, row)[:, None] + chunk[None, :]
    weight_at = linear.weight + feature.to(tl.int64)[:, None] * width + chunk[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, width, BLOCK_K):
        inside = (k + chunk < width)[None, :]
        values = tl.load(x_at + k, mask=exists[:, None] & inside, other=0.0)
        weight = tl.load(weight_at + k, mask=counts[:, None] & inside, other=0.0)
        if GELU:
            values = gelu(values.to(tl.float32))
        acc = product(values.to(linear.weight.dtype.element_ty), weight.T, acc, PRECISION)
    if linear.bias is not None:
        acc += tl.load(linear.bias + feature, mask=counts, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def linear_residual_forward(
    x, linear, residual, scale, out_ptr, width, features,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """residual + scale * Linear(x)."""
    column_tiles = tl.cdiv(features, BLOCK_N)
    row = (tl.program_id(0) // column_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    exists, counts = row < x.count, feature < features
    acc = linear_tile(x, linear, row, exists, feature, counts, width, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    acc = scaled(acc, scale, row, exists, feature, counts)
    acc += load_inside(row_starts(residual, row), exists, feature, counts).to(tl.float32)
    store_inside(out_ptr + row * features, exists, feature, counts, acc)


@triton.jit
def linear_scale_gradient(
    grad, x, linear, partial_ptr, width, features,
    GELU: tl.constexpr, PER_SAMPLE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums of grad * Linear(x) over a tile: of rows, to (rows, column tiles), or columns, to (row tiles, features)."""
    column_tiles = tl.cdiv(features, BLOCK_N)
    row_tile, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    row = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    exists, counts = row < x.count, feature < features
    acc = linear_tile(x, linear, row, exists, feature, counts, width, GELU, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    acc *= load_inside(row_starts(grad, row), exists, feature, counts).to(tl.float32)
    # A row that does not exist may have met an infinite bias.
    acc = tl.where(exists[:, None] & counts[None, :], acc, 0.0)
    if PER_SAMPLE:
        tl.store(partial_ptr + row * column_tiles + column_tile, tl.sum(acc, 1), mask=exists)
    else:
        tl.store(partial_ptr + row_tile.to(tl.int64) * features + feature, tl.sum(acc, 0), mask=counts)
