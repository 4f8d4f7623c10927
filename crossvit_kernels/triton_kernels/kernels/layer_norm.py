"""LayerNorm of rows: the steps that all kernels share, a kernel that writes the normalized rows to memory, for products
that read a row many times, and the backward."""

import triton
import triton.language as tl

from .arithmetic import gelu, gelu_derivative
from .tiles import load_columns, load_inside, load_rows, load_vector, row_starts, store_inside, within, zeros


@triton.jit
def held_or_loaded(chunks, starts, valid, k, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """The columns from k on of rows: of `chunks`, or, where that is None, read from where the rows begin."""
    if chunks is None:
        x = load_columns(starts, valid, k + tl.arange(0, BLOCK_K), WIDTH)
    else:
        x = chunks[k // BLOCK_K]
    return x


@triton.jit
def centred(x, origin, shift):
    """x - origin - shift, float32; shift may be None."""
    x = x.to(tl.float32) - origin[:, None]
    if shift is not None:
        x = x - shift[:, None]
    return x


@triton.jit
def row_statistics(
    chunks, starts, valid, eps, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, UNROLLED: tl.constexpr = True
):
    """(origin, shift, rstd) of rows, float32: the first element, the mean less that, and 1 / deviation.

    The mean and then the variance are those of x - x[0]: exact where the mean dwarfs the deviation. The rows are held
    as `chunks`, or that is None and they are read twice; `starts` may be None where they are held.
    """
    if starts is None:
        is_first = (tl.arange(0, BLOCK_K) == 0)[None, :]
        origin = tl.sum(tl.where(is_first, chunks[0].to(tl.float32), 0.0), 1)
    else:
        origin = tl.load(starts, mask=valid, other=0.0).to(tl.float32)
    columns = tl.arange(0, BLOCK_K)
    total = tl.zeros_like(origin)
    for k in (tl.static_range if UNROLLED else tl.range)(0, WIDTH, BLOCK_K):
        x = held_or_loaded(chunks, starts, valid, k, WIDTH, BLOCK_K)
        total += tl.sum(within(centred(x, origin, None), k + columns, WIDTH), 1)
    shift = total / WIDTH
    squares = tl.zeros_like(origin)
    for k in (tl.static_range if UNROLLED else tl.range)(0, WIDTH, BLOCK_K):
        x = held_or_loaded(chunks, starts, valid, k, WIDTH, BLOCK_K)
        x = within(centred(x, origin, shift), k + columns, WIDTH)
        squares += tl.sum(x * x, 1)
    return origin, shift, tl.rsqrt(squares / WIDTH + eps)


@triton.jit
def normalize(x, origin, shift, rstd, columns, WIDTH: tl.constexpr):
    """These columns of rows, normalized; zero beyond WIDTH. `shift` is None where `origin` is the mean."""
    return within(centred(x, origin, shift) * rstd[:, None], columns, WIDTH)


@triton.jit
def affine(x, norm, columns, WIDTH: tl.constexpr):
    """gamma x + beta, zero beyond WIDTH, where x has to be zero."""
    y = x * load_vector(norm.weight, columns, columns < WIDTH)[None, :]
    if norm.bias is not None:
        y += load_vector(norm.bias, columns, columns < WIDTH)[None, :]
    return y


@triton.jit
def normalized_cls(cls, norm, tokens, rows, valid, c, D: tl.constexpr):
    """The normalized CLS tokens of these images of so many tokens, in some columns, and their rstd."""
    mean = tl.load(norm.mean + rows * tokens, mask=valid, other=0.0)
    rstd = tl.load(norm.rstd + rows * tokens, mask=valid, other=0.0)
    return normalize(load_columns(cls.base + rows * cls.batch, valid, c, D), mean, None, rstd, c, D), rstd


@triton.jit
def layer_norm_rows(
    x, norm, y_ptr, eps, WIDTH: tl.constexpr, GELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """y = gamma (x - mean) rstd + beta, through gelu, and the statistics; x is read once."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < x.count
    x_at = row_starts(x, row)
    chunks = load_rows(x_at, exists, WIDTH, BLOCK_K)
    origin, shift, rstd = row_statistics(chunks, x_at, exists, eps, WIDTH, BLOCK_K)
    if norm.mean is not None:
        tl.store(norm.mean + row, origin + shift, mask=exists)
        tl.store(norm.rstd + row, rstd, mask=exists)
    for k in tl.static_range(0, WIDTH, BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)
        y = normalize(chunks[k // BLOCK_K], origin, shift, rstd, column, WIDTH)
        y = affine(y, norm, column, WIDTH)
        if GELU:
            y = gelu(y)
        store_inside(y_ptr + row * WIDTH, exists, column, column < WIDTH, y)


@triton.jit
def layer_norm_backward(
    grad_ptr, x, add, norm, grad_x_ptr, y_ptr, partial_ptr,
    WIDTH: tl.constexpr, GELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From grad (rows, WIDTH), the gradient of act(LayerNorm(x)): that of x, plus add, act(LayerNorm(x)) itself and the
    program's sums for gamma and beta, to partial (programs, 2 WIDTH), each if its pointer is given."""
    CHUNKS: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    chunk = tl.arange(0, BLOCK_K)
    weight_sums = zeros(CHUNKS, BLOCK_M, BLOCK_K)
    bias_sums = zeros(CHUNKS, BLOCK_M, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tl.cdiv(x.count, BLOCK_M), tl.num_programs(0)):
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        exists = row < x.count
        x_at = row_starts(x, row)
        mean = tl.load(norm.mean + row, mask=exists, other=0.0)[:, None]
        rstd = tl.load(norm.rstd + row, mask=exists, other=0.0)[:, None]
        normalized = ()
        grads = ()
        along = tl.zeros((BLOCK_M,), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        new_weight_sums = ()
        new_bias_sums = ()
        for k in tl.static_range(CHUNKS):
            column = k * BLOCK_K + chunk
            inside = column < WIDTH
            wanted = exists[:, None] & inside[None, :]
            at = row[:, None] * WIDTH + column[None, :]
            values = tl.load(x_at[:, None] + column[None, :], mask=wanted, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + at, mask=wanted, other=0.0).to(tl.float32)
            values = tl.where(wanted, (values - mean) * rstd, 0.0)
            weight = tl.load(norm.weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            if GELU or y_ptr is not None:
                y = values * weight
                if norm.bias is not None:
                    y += tl.load(norm.bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
                if y_ptr is not None:
                    activated = y
                    if GELU:
                        activated = gelu(y)
                    tl.store(y_ptr + at, activated.to(y_ptr.dtype.element_ty), mask=wanted)
                if GELU:
                    grad = tl.where(wanted, grad * gelu_derivative(y), 0.0)
            if partial_ptr is not None:
                new_weight_sums = new_weight_sums + (weight_sums[k] + grad * values,)
                new_bias_sums = new_bias_sums + (bias_sums[k] + grad,)
            if grad_x_ptr is not None:
                grad = tl.where(wanted, grad * weight, 0.0)
                along += tl.sum(grad * values, 1)
                total += tl.sum(grad, 1)
                normalized = normalized + (values,)
                grads = grads + (grad,)
        if partial_ptr is not None:
            weight_sums = new_weight_sums
            bias_sums = new_bias_sums
        if grad_x_ptr is not None:
            along = (along / WIDTH)[:, None]
            total = (total / WIDTH)[:, None]
            if add is not None:
                add_at = row_starts(add, row)
            for k in tl.static_range(CHUNKS):
                column = k * BLOCK_K + chunk
                grad = (grads[k] - normalized[k] * along - total) * rstd
                if add is not None:
                    grad += load_inside(add_at, exists, column, column < WIDTH).to(tl.float32)
                store_inside(grad_x_ptr + row * WIDTH, exists, column, column < WIDTH, grad)
    if partial_ptr is not None:
        partial_at = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * WIDTH
        for k in tl.static_range(CHUNKS):
            column = k * BLOCK_K + chunk
            tl.store(partial_at + column, tl.sum(weight_sums[k], 0), mask=column < WIDTH)
            tl.store(partial_at + WIDTH + column, tl.sum(bias_sums[k], 0), mask=column < WIDTH)
