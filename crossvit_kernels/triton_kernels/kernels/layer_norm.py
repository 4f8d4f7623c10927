"""LayerNorm of rows, and gelu behind it, to memory: for products that read a row many times."""

import triton
import triton.language as tl

from .arithmetic import gelu
from .tiles import row_offsets


@triton.jit
def layer_norm_rows(
    x_ptr,
    x_tokens,
    x_batch,
    x_row,
    norm_weight_ptr,
    norm_bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    eps,
    WIDTH: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = (x - mean) rstd norm_weight + norm_bias, through gelu; two passes over x - x[0], which is read once."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < rows
    x_at = x_ptr + row_offsets(row, x_tokens, x_batch, x_row)
    chunk = tl.arange(0, BLOCK_K)
    first = tl.load(x_at, mask=exists, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    chunks = ()
    for k in tl.static_range(0, WIDTH, BLOCK_K):
        inside = exists[:, None] & (k + chunk < WIDTH)[None, :]
        x = tl.load(x_at[:, None] + (k + chunk)[None, :], mask=inside, other=0.0).to(tl.float32) - first[:, None]
        x = tl.where((k + chunk < WIDTH)[None, :], x, 0.0)
        total += tl.sum(x, 1)
        chunks = chunks + (x,)
    shift = total / WIDTH
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for k in tl.static_range(0, WIDTH, BLOCK_K):
        x = tl.where((k + chunk < WIDTH)[None, :], chunks[k // BLOCK_K] - shift[:, None], 0.0)
        squares += tl.sum(x * x, 1)
    rstd = tl.rsqrt(squares / WIDTH + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, first + shift, mask=exists)
        tl.store(rstd_ptr + row, rstd, mask=exists)
    for k in tl.static_range(0, WIDTH, BLOCK_K):
        column = k + chunk
        counts = column < WIDTH
        y = (chunks[k // BLOCK_K] - shift[:, None]) * rstd[:, None]
        y *= tl.load(norm_weight_ptr + column, mask=counts, other=0.0).to(tl.float32)[None, :]
        if norm_bias_ptr is not None:
            y += tl.load(norm_bias_ptr + column, mask=counts, other=0.0).to(tl.float32)[None, :]
        if GELU:
            y = gelu(y)
        tl.store(
            y_ptr + row[:, None] * WIDTH + column[None, :],
            y.to(y_ptr.dtype.element_ty),
            mask=exists[:, None] & counts[None, :],
        )
