"""Backward of LayerNorm and of a gelu behind it, row by row."""

import triton
import triton.language as tl

from .arithmetic import gelu, gelu_derivative
from .tiles import row_offsets


@triton.jit
def layer_norm_backward(
    grad_ptr,
    x_ptr,
    x_tokens,
    x_batch,
    x_row,
    add_ptr,
    add_tokens,
    add_batch,
    add_row,
    mean_ptr,
    rstd_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    grad_x_ptr,
    y_ptr,
    partial_ptr,
    rows,
    WIDTH: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """From grad (rows, WIDTH), the gradient of act(LayerNorm(x)): that of x, plus add, act(LayerNorm(x)) itself and the
    program's sums for norm_weight and norm_bias, to partial (programs, 2 WIDTH), each if its pointer is given."""
    CHUNKS: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    chunk = tl.arange(0, BLOCK_K)
    weight_sums = ()
    bias_sums = ()
    for _ in tl.static_range(CHUNKS):
        weight_sums = weight_sums + (tl.zeros((BLOCK_M, BLOCK_K), tl.float32),)
        bias_sums = bias_sums + (tl.zeros((BLOCK_M, BLOCK_K), tl.float32),)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        exists = row < rows
        x_at = x_ptr + row_offsets(row, x_tokens, x_batch, x_row)
        mean = tl.load(mean_ptr + row, mask=exists, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=exists, other=0.0)[:, None]
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
            x = tl.load(x_at[:, None] + column[None, :], mask=wanted, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + at, mask=wanted, other=0.0).to(tl.float32)
            x = tl.where(wanted, (x - mean) * rstd, 0.0)
            weight = tl.load(norm_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            if GELU or y_ptr is not None:
                y = x * weight
                if norm_bias_ptr is not None:
                    y += tl.load(norm_bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
                if y_ptr is not None:
                    activated = y
                    if GELU:
                        activated = gelu(y)
                    tl.store(y_ptr + at, activated.to(y_ptr.dtype.element_ty), mask=wanted)
                if GELU:
                    grad = tl.where(wanted, grad * gelu_derivative(y), 0.0)
            if partial_ptr is not None:
                new_weight_sums = new_weight_sums + (weight_sums[k] + grad * x,)
                new_bias_sums = new_bias_sums + (bias_sums[k] + grad,)
            if grad_x_ptr is not None:
                grad = tl.where(wanted, grad * weight, 0.0)
                along += tl.sum(grad * x, 1)
                total += tl.sum(grad, 1)
                normalized = normalized + (x,)
                grads = grads + (grad,)
        if partial_ptr is not None:
            weight_sums = new_weight_sums
            bias_sums = new_bias_sums
        if grad_x_ptr is not None:
            along = (along / WIDTH)[:, None]
            total = (total / WIDTH)[:, None]
            add_at = add_ptr
            if add_ptr is not None:
                add_at = add_ptr + row_offsets(row, add_tokens, add_batch, add_row)
            for k in tl.static_range(CHUNKS):
                column = k * BLOCK_K + chunk
                wanted = exists[:, None] & (column < WIDTH)[None, :]
                grad = (grads[k] - normalized[k] * along - total) * rstd
                if add_ptr is not None:
                    grad += tl.load(add_at[:, None] + column[None, :], mask=wanted, other=0.0).to(tl.float32)
                at = grad_x_ptr + row[:, None] * WIDTH + column[None, :]
                tl.store(at, grad.to(grad_x_ptr.dtype.element_ty), mask=wanted)
    if partial_ptr is not None:
        partial_at = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * WIDTH
        for k in tl.static_range(CHUNKS):
            column = k * BLOCK_K + chunk
            tl.store(partial_at + column, tl.sum(weight_sums[k], 0), mask=column < WIDTH)
            tl.store(partial_at + WIDTH + column, tl.sum(bias_sums[k], 0), mask=column < WIDTH)
