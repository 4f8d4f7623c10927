"""A program normalises a tile of rows once and multiplies it by all of the weight's column tiles."""

import triton
import triton.language as tl

from .arithmetic import gelu, gelu_derivative, product
from .tiles import row_offsets


@triton.jit
def normalized(x, first, shift, rstd, norm_weight_ptr, norm_bias_ptr, columns, width, GELU: tl.constexpr):
    """LayerNorm of the chunk x (rows, columns), float32, and gelu; zero beyond the width."""
    inside = columns < width
    y = (x.to(tl.float32) - first[:, None] - shift[:, None]) * rstd[:, None]
    y = y * tl.load(norm_weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if norm_bias_ptr is not None:
        y += tl.load(norm_bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GELU:
        y = gelu(y)
    return tl.where(inside[None, :], y, 0.0)


@triton.jit
def layer_norm_linear_forward(
    x_ptr,
    x_tokens,
    x_batch,
    x_row,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    pre_ptr,
    rows,
    features,
    features_per_program,
    eps,
    WIDTH: tl.constexpr,
    GELU_IN: tl.constexpr,
    GELU_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    CHUNKS: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    KEEP: tl.constexpr = HELD and x_ptr.dtype.element_ty.primitive_bitwidth == 16
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < rows
    x_at = x_ptr + row_offsets(row, x_tokens, x_batch, x_row)
    chunk = tl.arange(0, BLOCK_K)

    # Of x less its first element the mean and then the variance: exact where the mean dwarfs the deviation.
    first = tl.load(x_at, mask=exists, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    raw = ()
    if HELD:
        for k in tl.static_range(CHUNKS):
            columns = k * BLOCK_K + chunk
            inside = (columns < WIDTH)[None, :]
            x = tl.load(x_at[:, None] + columns[None, :], mask=exists[:, None] & inside, other=0.0)
            if KEEP:
                raw = raw + (x,)
            total += tl.sum(tl.where(inside, x.to(tl.float32) - first[:, None], 0.0), 1)
        shift = total / WIDTH
        for k in tl.static_range(CHUNKS):
            columns = k * BLOCK_K + chunk
            inside = (columns < WIDTH)[None, :]
            if KEEP:
                x = raw[k]
            else:
                x = tl.load(x_at[:, None] + columns[None, :], mask=exists[:, None] & inside, other=0.0)
            x = tl.where(inside, x.to(tl.float32) - first[:, None] - shift[:, None], 0.0)
            squares += tl.sum(x * x, 1)
    else:
        for k in tl.range(0, WIDTH, BLOCK_K):
            inside = (k + chunk < WIDTH)[None, :]
            x = tl.load(x_at[:, None] + (k + chunk)[None, :], mask=exists[:, None] & inside, other=0.0)
            total += tl.sum(tl.where(inside, x.to(tl.float32) - first[:, None], 0.0), 1)
        shift = total / WIDTH
        for k in tl.range(0, WIDTH, BLOCK_K):
            inside = (k + chunk < WIDTH)[None, :]
            x = tl.load(x_at[:, None] + (k + chunk)[None, :], mask=exists[:, None] & inside, other=0.0)
            x = tl.where(inside, x.to(tl.float32) - first[:, None] - shift[:, None], 0.0)
            squares += tl.sum(x * x, 1)
    rstd = tl.rsqrt(squares / WIDTH + eps)
    if mean_ptr is not None:
        if tl.program_id(1) == 0:
            tl.store(mean_ptr + row, first + shift, mask=exists)
            tl.store(rstd_ptr + row, rstd, mask=exists)

    tiles = ()
    if HELD:
        for k in tl.static_range(CHUNKS):
            columns = k * BLOCK_K + chunk
            if KEEP:
                x = raw[k]
            else:
                x = tl.load(
                    x_at[:, None] + columns[None, :], mask=exists[:, None] & (columns < WIDTH)[None, :], other=0.0
                )
            y = normalized(x, first, shift, rstd, norm_weight_ptr, norm_bias_ptr, columns, WIDTH, GELU_IN)
            tiles = tiles + (y.to(weight_ptr.dtype.element_ty),)

    begin = tl.program_id(1) * features_per_program
    for n in tl.range(begin, min(begin + features_per_program, features), BLOCK_N):
        feature = n + tl.arange(0, BLOCK_N)
        counts = feature < features
        weight_at = weight_ptr + feature.to(tl.int64) * WIDTH
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if HELD:
            for k in tl.static_range(CHUNKS):
                columns = k * BLOCK_K + chunk
                wanted = counts[:, None] & (columns < WIDTH)[None, :]
                weight = tl.load(weight_at[:, None] + columns[None, :], mask=wanted, other=0.0)
                acc = product(tiles[k], weight.T, acc, PRECISION)
        else:
            for k in tl.range(0, WIDTH, BLOCK_K):
                columns = k + chunk
                inside = (columns < WIDTH)[None, :]
                x = tl.load(x_at[:, None] + columns[None, :], mask=exists[:, None] & inside, other=0.0)
                y = normalized(x, first, shift, rstd, norm_weight_ptr, norm_bias_ptr, columns, WIDTH, GELU_IN)
                weight = tl.load(weight_at[:, None] + columns[None, :], mask=counts[:, None] & inside, other=0.0)
                acc = product(y.to(weight_ptr.dtype.element_ty), weight.T, acc, PRECISION)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + feature, mask=counts, other=0.0).to(tl.float32)[None, :]
        at = row[:, None] * features + feature[None, :]
        wanted = exists[:, None] & counts[None, :]
        if pre_ptr is not None:
            tl.store(pre_ptr + at, acc.to(pre_ptr.dtype.element_ty), mask=wanted)
        if GELU_OUT:
            acc = gelu(acc)
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=wanted)


@triton.jit
def gelu_backward(grad_ptr, grad_tokens, grad_batch, grad_row, pre_ptr, out_ptr, size, width, BLOCK: tl.constexpr):
    """grad * gelu'(pre), pre and out dense (rows, width)."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    row = index // width
    at = row_offsets(row, grad_tokens, grad_batch, grad_row) + (index - row * width)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    pre = tl.load(pre_ptr + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + index, (grad * gelu_derivative(pre)).to(out_ptr.dtype.element_ty), mask=inside)
