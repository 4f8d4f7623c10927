"""A program normalises a tile of rows once and multiplies it by all of the weight's column tiles."""

import triton
import triton.language as tl

from .arithmetic import gelu, gelu_derivative, product
from .layer_norm import affine, held_or_loaded, normalize, row_statistics
from .tiles import load_columns, load_rows, row_starts


@triton.jit
def input_chunk(x, statistics, norm, columns, WIDTH: tl.constexpr, GELU: tl.constexpr):
    """The Linear's input of these columns of x, by the rows' (origin, shift, rstd); float32, zero beyond WIDTH."""
    origin, shift, rstd = statistics
    y = affine(normalize(x, origin, shift, rstd, columns, WIDTH), norm, columns, WIDTH)
    if GELU:
        y = gelu(y)
    return y


@triton.jit
def layer_norm_linear_forward(
    x, norm, linear, out_ptr, pre_ptr, features, features_per_program, eps,
    WIDTH: tl.constexpr, GELU_IN: tl.constexpr, GELU_OUT: tl.constexpr, PRECISION: tl.constexpr, HELD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """act(Linear(pre_act(LayerNorm(x)))) of BLOCK_M rows and `features_per_program` features.

    HELD: the rows' input of the Linear is made once and kept, as their x is if that has 16 bits; else x is read again,
    chunk by chunk, for every column tile.
    """
    KEEP: tl.constexpr = HELD and x.base.dtype.element_ty.primitive_bitwidth == 16
    dtype: tl.constexpr = linear.weight.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < x.count
    x_at = row_starts(x, row)
    chunk = tl.arange(0, BLOCK_K)
    chunks = load_rows(x_at, exists, WIDTH, BLOCK_K) if KEEP else None
    origin, shift, rstd = row_statistics(chunks, x_at, exists, eps, WIDTH, BLOCK_K, HELD)
    statistics = (origin, shift, rstd)
    if norm.mean is not None:
        if tl.program_id(1) == 0:
            tl.store(norm.mean + row, origin + shift, mask=exists)
            tl.store(norm.rstd + row, rstd, mask=exists)
    tiles: tl.tuple = ()
    if HELD:
        for k in tl.static_range(0, WIDTH, BLOCK_K):
            held = held_or_loaded(chunks, x_at, exists, k, WIDTH, BLOCK_K)
            held = input_chunk(held, statistics, norm, k + chunk, WIDTH, GELU_IN)
            tiles = tiles + (held.to(dtype),)

    begin = tl.program_id(1) * features_per_program
    for n in tl.range(begin, min(begin + features_per_program, features), BLOCK_N):
        feature = n + tl.arange(0, BLOCK_N)
        counts = feature < features
        weight_at = linear.weight + feature.to(tl.int64) * WIDTH
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in (tl.static_range if HELD else tl.range)(0, WIDTH, BLOCK_K):
            if HELD:
                y = tiles[k // BLOCK_K]
            else:
                columns = load_columns(x_at, exists, k + chunk, WIDTH)
                y = input_chunk(columns, statistics, norm, k + chunk, WIDTH, GELU_IN).to(dtype)
            acc = product(y, load_columns(weight_at, counts, k + chunk, WIDTH).T, acc, PRECISION)
        if linear.bias is not None:
            acc += tl.load(linear.bias + feature, mask=counts, other=0.0).to(tl.float32)[None, :]
        at = row[:, None] * features + feature[None, :]
        wanted = exists[:, None] & counts[None, :]
        if pre_ptr is not None:
            tl.store(pre_ptr + at, acc.to(pre_ptr.dtype.element_ty), mask=wanted)
        if GELU_OUT:
            acc = gelu(acc)
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=wanted)


@triton.jit
def gelu_backward(grad, pre_ptr, out_ptr, size, width, BLOCK: tl.constexpr):
    """grad * gelu'(pre), pre and out dense (rows, width)."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    row = index // width
    grads = tl.load(row_starts(grad, row) + (index - row * width), mask=inside, other=0.0).to(tl.float32)
    pre = tl.load(pre_ptr + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + index, (grads * gelu_derivative(pre)).to(out_ptr.dtype.element_ty), mask=inside)
